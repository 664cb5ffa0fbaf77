"""Where prefix-tree execution would not be exact, and why.

`tree_obstacle` looks at the model alone; what only a framework knows (image inputs, fused losses) is checked by
its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.errors import UnsupportedError
from dta_plugin.models.attention_registry import is_installable
from dta_plugin.models.indexers import indexers
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.layers import attention_modules, forward_has, layer_types, one_size
from dta_plugin.models.peft_methods import adapter_obstacle
from dta_plugin.models.recurrent_layers import layer_of, mixers, way
from dta_plugin.models.recurrent_registry import no_way
from dta_plugin.models.rotary import rotary_obstacle

# Kinds of layers that a tree runs; the last two have no attention.
_TREE_LAYERS = {"full_attention", "sliding_attention", "mlp", "moe"}
# Those that carry a state, some beside attention.
_STATE_LAYERS = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}
# Before, the layers of most families do not ask functions or caches that can be told from outside.
_STATES_KNOWN_SINCE = Version("5.15")
_STATE = "whose state would run across branches of the tree"
_COMPRESSED = "whose keys are made of several neighbouring tokens"
# What other kinds do.
_OTHER_LAYERS = {
    **dict.fromkeys(_STATE_LAYERS, _STATE),
    "indexed_attention": "which choose their keys by an index of their own",
    "minimax_m3_sparse": "which choose their keys by an index of their own",
    "chunked_attention": "which attend within ranges of positions that the config does not tell",
    **dict.fromkeys(("compressed_sparse_attention", "heavily_compressed_attention"), _COMPRESSED),
}
# Families whose configs do not tell what stands in the way.
_FAMILIES = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "reads the keys of another model"),
    **dict.fromkeys(("rwkv", "xlstm"), f"has recurrent layers, {_STATE}"),
}

# Where configs say that positions are rotary.
_ROTARY = ("rope_parameters", "rope_theta", "rotary_dim")

# What attention modules call the rate at which they drop attention weights.
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop", "attn_dropout_p")


def tree_obstacle(model: nn.Module, both_ways: bool = False) -> str | None:
    """Why this model cannot run as a tree ("what; remedy"), or None if it can.

    both_ways: attention in both directions is none: the tree's blocks stand for it.
    """
    try:
        base = causal_lm(model)
    except UnsupportedError as error:
        return error.reason
    config = base.config.get_text_config()
    return (
        _attention_obstacle(base, config, both_ways)
        or _position_obstacle(base, config)
        or rotary_obstacle(base)
        or dropout_obstacle(base)
        or adapter_obstacle(model)
    )


def _attention_obstacle(model: PreTrainedModel, config: Any, both_ways: bool) -> str | None:
    name = type(model).__name__
    family = next((_FAMILIES[c.model_type] for c in (model.config, config) if c.model_type in _FAMILIES), None)
    if family is not None:
        return f"{name} {family}; use another model family"
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap and config._attn_implementation == "sdpa":
        return (
            f"{name} has a soft-cap of {softcap}, which transformers' attention 'sdpa' leaves out; "
            "load the model with attn_implementation='eager'"
        )
    # "vision": among the tokens of an image only, which is for the adapters to see.
    is_bidirectional = getattr(config, "use_bidirectional_attention", False) not in (False, None, "vision")
    if not both_ways and (is_bidirectional or getattr(config, "is_causal", None) is False):
        return f"{name} attends in both directions; use a causal model"
    recurrent = list(mixers(model))
    reason = _layer_obstacle(name, config, {layer_of(mixer) for mixer in recurrent}, any(True for _ in indexers(model)))
    reason = reason or _mixer_obstacle(model, recurrent)
    if reason is None and None in attention_modules(model):
        reason = (
            f"{name} has an attention layer that is called in several places and does not say in which; use a model "
            "whose layers have their own"
        )
    if reason is None and not is_installable(model) and (attention_modules(model) or not recurrent):
        reason = (
            f"{name} does not call attention through transformers' AttentionInterface; use a model family that does"
        )
    return reason or _window_obstacle(model, config)


def _layer_obstacle(name: str, config: Any, recurrent: set[int], indexes_keys: bool) -> str | None:
    """recurrent: indices of the layers whose state is known. indexes_keys: by indexers that are."""
    kinds: dict[str, list[str]] = {}
    stated = {
        kind for index, kind in enumerate(layer_types(config)) if kind not in _STATE_LAYERS or index not in recurrent
    }
    if indexes_keys:
        stated.discard("indexed_attention")
    if one_size(config, "attention_chunk_size"):
        stated.discard("chunked_attention")
    unstated = {"indexed_attention"} if getattr(config, "index_topk", None) and not indexes_keys else set()
    for kind in sorted(stated - _TREE_LAYERS or unstated):
        kinds.setdefault(_OTHER_LAYERS.get(kind, "of which the tree knows nothing"), []).append(kind)
    if not kinds:
        return None
    remedy = "use a model with full or sliding-window attention only"
    if _STATE in kinds and Version(transformers.__version__) < _STATES_KNOWN_SINCE:
        remedy += f", or transformers {_STATES_KNOWN_SINCE} or newer, of which most recurrent layers are known"
    causes = [f"{', '.join(same)} layers, {what}" for what, same in kinds.items()]
    return f"{name} has {', and '.join(causes)}; {remedy}"


def _mixer_obstacle(model: PreTrainedModel, recurrent: list[nn.Module]) -> str | None:
    """Recurrent layers that have no way along a tree, and those that are not known: all convolve neighbours first."""
    without = next((mixer for mixer in recurrent if way(mixer) is None), None)
    if without is not None:
        return no_way(without)
    for module in model.modules():
        convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
        if "layer_idx" in vars(module) and convolves and module not in recurrent:
            return (
                f"{type(model).__name__} has {type(module).__name__} layers, {_STATE}; use a model with full or "
                "sliding-window attention only"
            )
    return None


def _window_obstacle(model: PreTrainedModel, config: Any) -> str | None:
    """The mask that the dense path gets goes by the config; the tree goes by what attention functions are told."""
    window = one_size(config, "sliding_window")
    modules = attention_modules(model)
    sliding = [modules.get(index) for index, kind in enumerate(layer_types(config)) if kind == "sliding_attention"]
    if not window or not sliding:
        return None
    name = type(model).__name__
    if not all(module is None or _tells_window(module) for module in sliding):
        option = "layer_types to 'full_attention'" if getattr(config, "layer_types", None) else "sliding_window=None"
        return (
            f"{name} does not tell its attention function about the sliding window of {window}; set {option} in the "
            "config if no sequence is longer"
        )
    return None


def _tells_window(module: nn.Module) -> bool:
    return forward_has(module, "sliding_window") and getattr(module, "sliding_window", True) is not None


def _position_obstacle(model: PreTrainedModel, config: Any) -> str | None:
    is_rotary = any(getattr(config, name, None) is not None for name in _ROTARY)
    if not is_rotary and not _has_no_positions(model):
        return (
            f"{type(model).__name__} has no rotary positions: padding shifts absolute ones, so that a padded batch and "
            "its rows alone may differ; use a rotary model"
        )
    return None


def _has_no_positions(model: PreTrainedModel) -> bool:
    """Recurrent layers tell the order of tokens: attention may do without, and nothing embeds positions."""
    return bool(mixers(model)) and sum(isinstance(each, nn.Embedding) for each in model.modules()) == 1


def dropout_obstacle(model: PreTrainedModel) -> str | None:
    """The part of `tree_obstacle` that may change from call to call."""
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
