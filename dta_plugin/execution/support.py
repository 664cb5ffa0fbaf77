"""Where prefix-tree execution would not be exact, and why.

`unsupported_reason` looks at the model alone; what only a framework knows (image inputs, fused losses) is checked by
its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention.layers import attention_modules, layer_types
from dta_plugin.errors import UnsupportedModelError
from dta_plugin.execution.adapters import adapter_reason
from dta_plugin.execution.model import causal_lm
from dta_plugin.execution.rotary import rotary_reason

_TREE_LAYERS = {"full_attention", "sliding_attention"}

# What attention modules call the rate at which they drop attention weights.
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop", "attn_dropout_p")


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model cannot run as a tree ("what; remedy"), or None if it can."""
    try:
        base = causal_lm(model)
    except UnsupportedModelError as error:
        return str(error)
    config = base.config.get_text_config()
    return (
        _attention_reason(base, config)
        or _position_reason(base, config)
        or rotary_reason(base)
        or dropout_reason(base)
        or adapter_reason(model)
    )


def _attention_reason(model: PreTrainedModel, config: Any) -> str | None:
    other = sorted(set(layer_types(config)) - _TREE_LAYERS)
    if other:
        return (
            f"{type(model).__name__} has {', '.join(other)} layers, whose state would run across branches of the tree; "
            "use a model with full or sliding-window attention only"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap and config._attn_implementation == "sdpa":
        return (
            f"{type(model).__name__} has a soft-cap of {softcap}, which transformers' attention 'sdpa' leaves out; "
            "load the model with attn_implementation='eager'"
        )
    # "vision": among the tokens of an image only, which is for the adapters to see.
    is_bidirectional = getattr(config, "use_bidirectional_attention", False) not in (False, None, "vision")
    if is_bidirectional or getattr(config, "is_causal", None) is False:
        return f"{type(model).__name__} attends in both directions; use a causal model"
    if not model._can_set_attn_implementation():
        return (
            f"{type(model).__name__} does not call attention through transformers' AttentionInterface; use a current "
            "transformers implementation of the model"
        )
    return None


def _position_reason(model: PreTrainedModel, config: Any) -> str | None:
    if getattr(config, "rope_parameters", None) is None and getattr(config, "rope_theta", None) is None:
        return (
            f"{type(model).__name__} has no rotary positions: with absolute positions, left padding changes the dense "
            "path's own result; use a rotary model"
        )
    return None


def dropout_reason(model: PreTrainedModel) -> str | None:
    """The part of `unsupported_reason` that may change from call to call."""
    if not model.training:
        return None
    for where, rate in _dropout_rates(model):
        if rate:
            return (
                f"attention_dropout is {rate} in {where}: shared tokens would share one dropout mask; set "
                "attention_dropout=0 in the model config before the model is loaded"
            )
    return None


def _dropout_rates(model: PreTrainedModel) -> Iterator[tuple[str, float]]:
    """(where, rate) as each attention layer holds it; the config counts where the layer does not."""
    config = model.config.get_text_config()
    stated = getattr(config, "attention_dropout", 0.0) or getattr(
        getattr(config, "attn_config", None), "attn_pdrop", 0.0
    )
    modules = attention_modules(model)
    if not modules:
        yield "the model config", stated
    for index, module in modules.items():
        held = [getattr(module, name) for name in _DROPOUTS if hasattr(module, name)]
        rates = [rate.p if isinstance(rate, nn.Dropout) else rate for rate in held]
        numbers = [rate for rate in rates if isinstance(rate, (int, float))]
        yield f"layer {index}", max(numbers, default=stated)
