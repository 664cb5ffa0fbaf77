"""The layers of a language model: which modules attend, what kind each layer is, what a module's code looks at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Every module that calls transformers' attention functions, which read them, has one of these; decoder layers do not.
_READ_BY_ATTENTION = ("num_key_value_groups", "is_causal", "scaling")


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

    That of a parent counts where it is called. True where there is no code to look at.
    """
    return class_has(type(module), name, unseen=True)


def class_has(kind: type[nn.Module], name: str, unseen: bool = False) -> bool:
    """As `forward_has`, of a class. unseen: the answer where there is no code to look at."""
    codes = (getattr(forward, "__code__", None) for forward in forwards(kind))
    return any(unseen if code is None else _has(code, name) for code in codes)


def forwards(kind: type[nn.Module]) -> Iterator[Any]:
    """The forward of a class, unwrapped, and those of its parents as far as one calls the next."""
    for parent in kind.__mro__:
        if "forward" in vars(parent):
            own = inspect.unwrap(vars(parent)["forward"])
            yield own
            code = getattr(own, "__code__", None)
            if code is not None and not {"super", "forward"} & {*code.co_names}:
                return


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
    return [kind] * (number(config, "num_hidden_layers") or 0)


def chunk_size(config: Any, layer: int) -> int | None:
    """The ranges of positions within which a layer attends; None for most."""
    chunk = number(config, "attention_chunk_size")
    if chunk is None:
        return None
    return chunk if (layer, "chunked_attention") in enumerate(layer_types(config)) else None


def one_size(owner: Any, name: str) -> Any:
    """An attribute of a module or config; None where there is none, or where layers differ in it."""
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # transformers' refusal to give one value for all layers
        return None


def number(owner: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive number."""
    values = (one_size(owner, name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
