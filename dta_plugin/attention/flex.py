"""Tree attention through torch's FlexAttention, for GPUs and head dims that the Triton kernels do not serve.

The interval test ``j <= i < exit[j]`` is the mask function, or that of blocks that attend both ways; sinks come in
afterwards through the log-sum-exp. Compiled with dynamic shapes, so that a new length does not recompile.
FlexAttention has no CPU backward.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dta_plugin.attention.mask import TreeMask


def flex_tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in `tree_attention`."""
    queries = q.shape[2]
    block_mask = mask.cached(("flex", window, queries), lambda: _block_mask(mask, window, queries))

    def capped(score: torch.Tensor, *_position: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    run = _compiled(flex_attention) if q.is_cuda else flex_attention
    out, lse = run(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
    )
    if sinks is None:
        return out
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])  # exp(lse) / (exp(lse) + exp(sink))
    return (out * kept[..., None]).to(q.dtype)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _block_mask(mask: TreeMask, window: int | None, queries: int) -> BlockMask:
    exit_, depth, reach, first_query = mask.exit, mask.depth, mask.reach, len(mask) - queries
    is_whole = mask.rule == "whole"

    def visible(_batch, _head, row, key):
        query = row + first_query
        seen = (key <= query if reach is None else key < reach[query]) & (query < exit_[key])
        if window is None:
            return seen
        near = depth[query] - depth[key] < window
        if reach is None or not is_whole:
            return seen & near
        return seen & (near | (reach[query] == reach[key]))

    build = _compiled(create_block_mask) if exit_.is_cuda else create_block_mask
    return build(visible, None, None, queries, len(mask), device=exit_.device)
