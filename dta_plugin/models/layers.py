"""The attention layers of a language model, and the sizes in which they may differ from each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Every module that calls transformers' attention functions, which read them, has one of these; decoder layers do not.
_READ_BY_ATTENTION = ("num_key_value_groups", "is_causal", "scaling")
_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj")


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """One layer's attention. head_dims: of keys and of values. window: None for full attention."""

    heads: int
    kv_heads: int
    head_dims: tuple[int, int]
    window: int | None


def indexed_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules of the language model that know the index of their layer: attention, and some decoder layers.

    They are told from those of vision towers by the class of their config.
    """
    kind = type(model.config.get_text_config())
    for module in model.modules():
        own = vars(module)
        if "layer_idx" in own and isinstance(own.get("config"), kind):
            yield module


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The self-attention module of every layer that has one, by the layer's index.

    Layers with cross-attention to images have none: on text alone they are passed over.
    """
    return {
        module.layer_idx: module  # type: ignore[misc]  # an int
        for module in indexed_modules(model)
        if any(hasattr(module, name) for name in _READ_BY_ATTENTION) and "CrossAttention" not in type(module).__name__
    }


def forward_has(module: nn.Module, name: str) -> bool:
    """Whether the forward of the module's class has `name` in its code: an attribute, a keyword or a string.

    True where there is no code to look at.
    """
    return class_has(type(module), name, unseen=True)


def class_has(kind: type[nn.Module], name: str, unseen: bool = False) -> bool:
    """As `forward_has`, of a class. unseen: the answer where there is no code to look at."""
    own = (vars(parent)["forward"] for parent in kind.__mro__ if "forward" in vars(parent))
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in own]
    return any(unseen if code is None else _has(code, name) for code in codes)


def _has(code: CodeType, name: str) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    keywords = [constant for constant in code.co_consts if isinstance(constant, tuple)]
    return name in (*code.co_names, *code.co_consts, *sum(keywords, ())) or any(_has(c, name) for c in inner)


def layer_types(config: Any) -> list[str]:
    """Per decoder layer: "full_attention", "sliding_attention", or another kind of layer."""
    types_ = getattr(config, "layer_types", None)
    if types_:
        return list(types_)
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [kind] * (_number(config, "num_hidden_layers") or 0)


def attention_sizes(model: PreTrainedModel) -> list[AttentionSizes]:
    """The sizes of every layer, as its module has them, or else as the config says."""
    config = model.config.get_text_config()
    modules = attention_modules(model)
    return [_sizes(modules.get(index), config, kind) for index, kind in enumerate(layer_types(config))]


def _sizes(module: nn.Module | None, config: Any, kind: str) -> AttentionSizes:
    heads = _number(module, "num_heads", "num_attention_heads") or config.num_attention_heads
    width = _number(module, "qk_head_dim", "head_dim", "head_size") or _head_dim(config)
    value_width = _number(module, "v_head_dim") or width
    output = next((o for o in (getattr(module, name, None) for name in _OUTPUTS) if hasattr(o, "in_features")), None)
    if output is not None:
        heads = output.in_features // value_width or heads
    groups = _number(module, "num_key_value_groups")
    kv_heads = heads // groups if groups else _number(config, "num_key_value_heads") or heads
    window = _number(module, "sliding_window") or _number(config, "sliding_window")
    return AttentionSizes(heads, kv_heads, (width, value_width), window if kind.startswith("sliding") else None)


def one_size(owner: Any, name: str) -> Any:
    """An attribute of a module or config; None where there is none, or where layers differ in it."""
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # transformers' refusal to give one value for all layers
        return None


def _number(owner: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive number."""
    values = (one_size(owner, name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _head_dim(config: Any) -> int:
    return _number(config, "head_dim") or config.hidden_size // config.num_attention_heads
