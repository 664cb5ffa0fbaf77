"""Megatron's GPTModel on trees: wherever a call's `packed_seq_params` are a tree's, else everything is as it was.

Three things are wrapped on the instances: `_preprocess`, whose rotary table is gathered by depth; each layer's
`core_attention`, on this rank's heads; and `_postprocess`, which runs the head on rows that are scored, and no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import is_layer_window_attention

from dta_plugin.adapters.verl_plugin.megatron.row import TreePackedSeqParams, TreeRow
from dta_plugin.attention import tree_attention


def read_along_trees(model: Any) -> None:
    """Wrap an unwrapped GPTModel, one pipeline stage or a chunk of one."""
    model._preprocess = _by_depth(model._preprocess)
    model._postprocess = _scored_rows(model, model._postprocess)
    for layer in model.decoder.layers:
        core = layer.self_attention.core_attention
        core.forward = _along_tree(core.forward, model.config, layer.layer_number)


def run_row(model: Any, row: TreeRow, stage: Any) -> tuple[torch.Tensor, str | None]:
    """Call a stage of the model, wrapped as verl has it; stage: unwrapped.

    Logits of scored rows [1, R, V / tensor-parallel size] from the last one, else hidden states for the next. And what
    is wrong where an attention layer of the stage did not use the tree: other stages wait for what this one sends, so
    it is for the engine to raise, on all ranks.
    """
    params = row.params
    params.mask.calls.clear()
    position_ids = params.depth[None]
    output = model(input_ids=row.input_ids, position_ids=position_ids, attention_mask=None, packed_seq_params=params)
    missed = [number for number in _layer_numbers(stage) if not params.mask.calls[number]]
    if not missed:
        return output, None
    return output, (
        f"Attention layer(s) {missed} of Megatron's {type(stage).__name__} did not use the tree: something replaced "
        "their core attention. Expected every layer to call it; switch off whatever patches attention."
    )


def _layer_numbers(model: Any) -> Iterator[int]:
    return (layer.layer_number for layer in model.decoder.layers)


def _by_depth(own: Callable[..., Any]) -> Callable[..., Any]:
    """GPTModel._preprocess: the rotary table [longest, 1, 1, d], as Megatron makes it, becomes one row per token."""

    @functools.wraps(own)
    def wrapped(*args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        decoder_input, table, *others = own(*args, packed_seq_params=packed_seq_params, **kwargs)
        if isinstance(packed_seq_params, TreePackedSeqParams) and table is not None:
            table = table.index_select(0, packed_seq_params.depth)
        return decoder_input, table, *others

    return wrapped


def _along_tree(own: Callable[..., Any], config: Any, number: int) -> Callable[..., Any]:
    """The forward of a layer's core attention. number: of the layer, from 1."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number)
    window = config.window_size[0] + 1 if windowed else None  # Megatron counts the keys before a query's own

    @functools.wraps(own)
    def wrapped(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query: [T, heads, d] of this rank's heads; key, value: alike. -> [T, heads * d]."""
        if not isinstance(packed_seq_params, TreePackedSeqParams):
            return own(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
        mask = packed_seq_params.mask
        mask.calls[number] += 1
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = tree_attention(q, k, v, mask, scale=config.softmax_scale, window=window)
        return out[0].transpose(0, 1).flatten(1)

    return wrapped


def _scored_rows(model: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    """GPTModel._postprocess, which turns hidden states [T, 1, H] into logits."""

    @functools.wraps(own)
    def wrapped(hidden_states: torch.Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        if not isinstance(packed_seq_params, TreePackedSeqParams) or not model.post_process:
            return own(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        head = model.output_layer
        is_sequence_parallel = head.sequence_parallel
        if is_sequence_parallel:  # the head would gather all rows; it gives each rank the whole gradient of its input
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=model.pg_collection.tp
            )
        scored = hidden_states.index_select(0, packed_seq_params.rows)
        head.sequence_parallel = False
        try:
            return own(scored, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            head.sequence_parallel = is_sequence_parallel

    return wrapped
