"""What models tell their attention functions beside queries, keys and values: known to the tree, or refused by name."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from dta_plugin.errors import UnsupportedError
from dta_plugin.models.layers import layer_types, one_size

# What attention functions are told that changes nothing about a causal tree without a cache.
_OF_NO_EFFECT = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "logits_to_keep",
    "deterministic",
    "is_causal",
    "dropout",
    "return_shared_kv_states",
}
_KNOWN = _OF_NO_EFFECT | {"scaling", "sliding_window", "softcap", "s_aux"}


def check_keywords(module: nn.Module, keywords: dict[str, Any], both_ways: bool = False) -> None:
    """Raises UnsupportedError for what the tree would leave out, or what contradicts the config.

    both_ways: the tree has blocks in which every layer attends in both directions.
    """
    name = type(module).__name__
    told = (key for key, value in keywords.items() if value is not None and not key.startswith("dta_"))
    unknown = [key for key in told if key not in _KNOWN]
    if unknown:
        raise UnsupportedError(
            f"{name} gives its attention function {', '.join(unknown)}, which the tree does not know. Expected only "
            "what causal attention needs (scale, window, soft-cap, sinks); use another model."
        )
    if keywords.get("is_causal") is False and not both_ways:
        raise UnsupportedError(
            f"{name} asks for attention in both directions (is_causal=False). Expected causal attention; use a causal "
            "model."
        )
    if keywords.get("dropout"):
        raise UnsupportedError(
            f"{name} asks for attention dropout of {keywords['dropout']}: shared tokens would share one dropout mask. "
            "Expected 0; set the rate to 0 in the model config before the model is loaded."
        )
    _check_window(module, keywords.get("sliding_window"))


def _check_window(module: nn.Module, window: int | None) -> None:
    """The mask that the dense path would get goes by the config; the tree goes by what the attention function is told.

    Raises UnsupportedError where they differ.
    """
    config = cast(Any, module).config
    layer = cast(int, module.layer_idx)
    kinds = layer_types(config)
    kind = kinds[layer] if layer < len(kinds) else None
    stated = one_size(config, "sliding_window") if kind == "sliding_attention" else None
    if kind in ("full_attention", "sliding_attention") and window != stated:
        raise UnsupportedError(
            f"{type(module).__name__} tells its attention function of {_named(window)} in layer {layer}, and its "
            f"config says {_named(stated)} there ({kind}). Expected both to agree; set sliding_window=None in the "
            "config if no sequence is longer than the window."
        )


def _named(window: int | None) -> str:
    return "no window" if window is None else f"a window of {window}"
