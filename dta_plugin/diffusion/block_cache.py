"""Logits of a block's columns, call after call, from a canvas whose other columns need not run again.

Keys and values of a layer lie in one buffer by column. A call runs some columns, writes theirs, and attends to the
buffer. A block's first call runs whatever the block before has left out of date; its later calls run the block alone
(`kv_cache` "dual"), or the block and, with full attention, the masked blocks behind it ("prefix").

Where attention is causal over blocks a finished block's states depend on nothing that still changes: the first call of
the next block runs it once more, with all of its tokens, and the samples are those without a cache. Where attention is
full they depend on the whole canvas, and what is kept is what they were at the block's first call, which runs every
column: an approximation, with one exact call per block (Fast-dLLM, arXiv 2505.22618).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from dta_plugin.diffusion.family import (
    DiffusionFamily,
    check_attention,
    explicit_mask,
    explicit_mask_obstacle,
    logit_rows,
    predictions,
)
from dta_plugin.diffusion.sampler_config import SamplerConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import causal_lm

_PARAMETERS = ("cache", "past_key_values")  # of transformers' forwards, the newer name first


class ColumnCache(Cache):
    """Keys and values [B, H, S, D] of every layer, by column of a canvas of `columns` tokens.

    running: the columns of the next call, whose states it writes. visible: how many columns, from the first on, its
    tokens may attend to.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(layers=[])
        self.columns = columns
        self.running = slice(0, 0)
        self.visible = 0
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by attention layers."""
        if layer_idx not in self.states:
            self.states[layer_idx] = (self._empty(key_states), self._empty(value_states))
        keys, values = self.states[layer_idx]
        keys[:, :, self.running], values[:, :, self.running] = key_states, value_states
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, width = states.shape
        return states.new_zeros(rows, heads, self.columns, width)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.running.start

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but these, int64 [b]."""
        self.states = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.states.items()}


class BlockReader:
    """How `sample` asks the model about the block that it fills. prompt_length: columns before the canvas."""

    def __init__(self, model: nn.Module, family: DiffusionFamily, config: SamplerConfig, prompt_length: int) -> None:
        self.model, self.family, self.config, self.prompt_length = model, family, config, prompt_length
        self.kind = _cache_kind(model, family, config)
        self.cache = None if self.kind == "none" else ColumnCache(prompt_length + config.gen_length)
        self.stale = 0  # the first column whose states a block's first call has to renew
        self.begin = 0  # the first column that a block's later calls run
        self.is_first = True

    def start_block(self, first_column: int) -> None:
        """first_column: of the block, of any row; before the canvas where a block goes on with a prompt's last one."""
        self.stale = self.begin if self.family.block_length else 0
        self.begin = max(first_column - self.family.is_shifted, 0)
        self.is_first = True

    def logits(self, rows: torch.Tensor, attention: torch.Tensor, window: slice) -> torch.Tensor:
        """Logits [b, w, V] of the window's columns, guided. rows, attention: [b, S] what the block may see."""
        if not self.config.guidance_scale:
            return self._read(rows, attention, window)
        blind = rows.clone()
        blind[:, : self.prompt_length] = self.family.mask_token_id
        both = self._read(torch.cat([rows, blind]), attention.repeat(2, 1), window)
        conditional, unconditional = both.chunk(2)
        return unconditional + (1.0 + self.config.guidance_scale) * (conditional - unconditional)

    def keep(self, rows: torch.Tensor, of: int) -> None:
        """Rows, int64 [b], of the `of` that ran stay; the others are done."""
        if self.cache is not None and len(rows) < of:
            self.cache.keep(torch.cat([rows, rows + of]) if self.config.guidance_scale else rows)

    def _read(self, ids: torch.Tensor, attention: torch.Tensor, window: slice) -> torch.Tensor:
        if self.cache is None:
            return predictions(self.model, self.family, ids, attention, window)
        if self.is_first:
            running = slice(self.stale, ids.shape[1])
        else:
            running = slice(self.begin, window.stop if self.kind == "dual" else ids.shape[1])
        self.is_first = False
        return cached_predictions(self.model, self.family, self.cache, ids, attention, window, running)


def cached_predictions(
    model: nn.Module,
    family: DiffusionFamily,
    cache: ColumnCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    columns: slice,
    running: slice,
) -> torch.Tensor:
    """`predictions` of the columns, from a call that runs only these; the cache holds the states of all others.

    input_ids: int64 [B, S]. attention_mask: [B, S].
    """
    check_attention(model, family, input_ids.device)
    base = causal_lm(model)
    mask = explicit_mask(base, input_ids, attention_mask, family.block_length, running)
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, running]
    cache.running, cache.visible = running, input_ids.shape[1]
    parameters = inspect.signature(base.forward).parameters
    call = {
        "input_ids": input_ids[:, running],
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": True,
        "is_causal": False,
        next(name for name in _PARAMETERS if name in parameters): cache,
    }
    rows = logit_rows(family, columns.start, columns.stop, input_ids.device) - running.start
    if "logits_to_keep" in parameters:
        logits = model(**call, logits_to_keep=rows).logits
    else:
        logits = model(**call).logits.index_select(1, rows)
    if not cache.states:
        raise UnsupportedError(
            f"{type(base).__name__} took a cache and wrote nothing into it. Expected a decoder of transformers; set "
            "kv_cache='none'."
        )
    return logits


def _cache_kind(model: nn.Module, family: DiffusionFamily, config: SamplerConfig) -> str:
    """ "none", "prefix" or "dual". Raises UnsupportedError for a cache that is asked for and cannot be."""
    if config.kv_cache == "none" or (config.kv_cache == "auto" and family.block_length is None):
        return "none"
    reason = _obstacle(causal_lm(model))
    if reason is None:
        return "prefix" if config.kv_cache == "auto" else config.kv_cache
    if config.kv_cache == "auto":
        return "none"
    raise UnsupportedError(f"kv_cache={config.kv_cache!r}: {reason}. Or set kv_cache='none'.")


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot run with a cache."""
    if not set(_PARAMETERS) & set(inspect.signature(model.forward).parameters):
        return f"{type(model).__name__} takes no cache. Expected a decoder of transformers"
    if model.training and model.is_gradient_checkpointing:
        return "gradient checkpointing is on, with which transformers drops caches. Expected evaluation mode, or it off"
    return explicit_mask_obstacle(model)
