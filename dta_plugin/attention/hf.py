"""Registration with transformers' attention and mask registries.

`install(model)` puts our function in front of the attention implementation that the model already has. Without tree
metadata it calls that implementation with the arguments it was given, so generation and dense passes stay
bit-identical and it can stay on for good. It *must* stay on while a graph is alive: a checkpointed layer looks the
implementation up again when it is recomputed in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dta_plugin.attention.api import tree_attention
from dta_plugin.attention.mask import TreeMask
from dta_plugin.errors import UnsupportedModelError

# The name of our function in front of each implementation. Numbered, because transformers tests for substrings such
# as "sdpa" and "flash" in these names.
_PREFIX = "dta_tree_"
_name_of: dict[str, str] = {}
_base_of: dict[str, str] = {}


def install(model: PreTrainedModel) -> None:
    """Route the model's attention through `tree_attention` whenever a call carries tree metadata. Idempotent."""
    base = model.config._attn_implementation
    if base in _base_of:
        return
    model.set_attn_implementation(_register(base))
    if model.config._attn_implementation not in _base_of:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not let its attention be set. Expected a model whose attention goes through "
            "transformers' AttentionInterface; use a current transformers implementation, or on_unsupported='dense'."
        )


def uninstall(model: PreTrainedModel) -> None:
    """Give the model its own attention implementation back. No graph of a tree call may be alive."""
    base = _base_of.get(model.config._attn_implementation)
    if base is not None:
        model.set_attn_implementation(base)


def is_installed(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in _base_of


def own_attention(model: PreTrainedModel) -> str:
    """The name of the model's own attention implementation, installed or not."""
    name = model.config._attn_implementation
    return _base_of.get(name, name)


def _register(base: str) -> str:
    if base not in _name_of:
        name = f"{_PREFIX}{len(_name_of)}"
        AttentionInterface.register(name, _dispatching_over(base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        _name_of[base], _base_of[name] = name, base
    return _name_of[base]


def _dispatching_over(base: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dta_tree: TreeMask | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dta_tree is None:
            return _implementation(base, module)(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.numel() > 1:
            raise UnsupportedModelError(
                f"{type(module).__name__} adds a mask or bias of its own to attention, of shape "
                f"{tuple(attention_mask.shape)}. Expected the causal mask alone, which the tree replaces; use another "
                "model, or on_unsupported='dense'."
            )
        query, key, value = _autocast(query, key, value)
        layer = cast(int, module.layer_idx)
        out = tree_attention(
            query,
            key,
            value,
            dta_tree.at_layer(layer),
            scale=kwargs.get("scaling"),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        dta_tree.layers_seen.add(layer)
        return out.transpose(1, 2), None

    return attention


def _autocast(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Under autocast, one dtype, as torch's own attention has it: rotary positions leave query and key in float32."""
    kind = inputs[0].device.type
    enabled = torch.is_autocast_enabled(kind)
    return (x.to(torch.get_autocast_dtype(kind)) if enabled else x for x in inputs)


def _implementation(base: str, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The function the model would have called: the registry's, or its modeling file's eager one."""
    eager = cast(Callable[..., Any], getattr(sys.modules[type(module).__module__], "eager_attention_forward", None))
    return eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
