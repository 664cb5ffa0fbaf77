"""Attention within fixed ranges of positions (Llama 4): a query sees the ancestors that are in its own range.

Sorted by range, and within one in depth-first order, the tokens of a tree are a forest again, whose roots are where
ranges begin. So any backend serves, on tokens in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dta_plugin.attention.api import tree_attention
from dta_plugin.attention.mask import TreeMask
from dta_plugin.errors import UnsupportedError
from dta_plugin.upload import upload


def chunked_tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask, chunk: int, **options: Any
) -> torch.Tensor:
    """`tree_attention` in which query i sees key j only if ``depth[i] // chunk == depth[j] // chunk``.

    Args:
        q, k, v, mask, options: as for `tree_attention`.
        chunk: positions per range.

    Raises:
        UnsupportedError: the queries are a chunk of a streamed tree, and some token is in the second range; or blocks
            of tokens attend both ways, which no model has together with ranges.
    """
    if mask.reach is not None:
        raise UnsupportedError(
            f"Attention in ranges of {chunk} positions in a layer whose images attend both ways. Expected one or the "
            "other; use another model."
        )
    if mask.host()[1].max(initial=0) < chunk:
        return tree_attention(q, k, v, mask, **options)
    if mask.place.first or q.shape[2] < len(mask):
        raise UnsupportedError(
            f"executor='streamed' with attention in ranges of {chunk} positions, and longer sequences. Expected none "
            f"of more than {chunk} tokens; use executor='packed'."
        )
    order, back, inner = mask.cached(("ranges", chunk), lambda: _by_range(mask, chunk))
    out = tree_attention(q[:, :, order], k[:, :, order], v[:, :, order], inner, **options)
    mask.backends_used |= inner.backends_used
    return out[:, :, back]


def _by_range(mask: TreeMask, chunk: int) -> tuple[torch.Tensor, torch.Tensor, TreeMask]:
    """int64 [T] the tokens in their new order, and where each went; the forest that they are then."""
    exit_, depth = mask.host()
    of_range = depth // chunk
    order = np.argsort(of_range, kind="stable")
    begins = np.searchsorted(of_range[order], np.arange(of_range.max() + 2))
    inner_exit = np.empty_like(exit_)
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        tokens = order[begin:end]
        inner_exit[begin:end] = begin + np.searchsorted(tokens, exit_[tokens])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    host = inner_exit, depth[order]
    places = upload([order, back, *host], mask.exit.device)
    return places[0], places[1], TreeMask(places[2], places[3], mask.backend, host)
