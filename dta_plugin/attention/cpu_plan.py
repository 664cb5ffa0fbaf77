"""Which (queries x keys) rectangles the CPU path computes, so that no T x T mask is ever built.

Two ways to cover the visible pairs of a tree, both exact:

* `cascade`: every node attends causally to itself, and every internal node is one mask-free rectangle (all its
  descendants, a contiguous slice of queries, x its keys). Long nodes go row by row; small subtrees are merged into one
  masked square. Best for the usual trees: few long nodes.
* `blocks`: every block of queries attends to its path, gathered, and to itself under a small mask. Serves sliding
  windows, and trees of many short internal nodes, where the cascade would merge too many partial results.

A block of tokens that attend both ways is never cut: the cascade has it as one mask-free rectangle, with all that comes
before it in its node; `blocks` ends a block of queries before it or behind it.

All index arrays are numpy int64; plans are made once per tree and shared by all layers and passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from dta_plugin.attention.blocks import Blocks, cut_after, cut_before

_UNIT = 64  # subtrees up to this many tokens are computed as one masked square
_BLOCK = 128  # queries per block
# Relative costs, in computed query-key pairs of one head; measured on x86 with head_dim 64.
_MERGE_PER_QUERY = 20
_CALL = 5000


@dataclass(frozen=True, slots=True)
class Piece:
    """One attention call: queries `q` see keys `k`, all of them unless `causal` or a `bias` says otherwise.

    q: slice of layout tokens. k: slice, or int64 index tensor [nk]. bias: float32 [nq, nk], 0 or -inf.
    first: these queries have no partial result yet.
    """

    q: slice
    k: slice | torch.Tensor
    first: bool
    causal: bool = False
    bias: torch.Tensor | None = None

    def cost(self) -> int:
        nq = self.q.stop - self.q.start
        nk = len(self.k) if isinstance(self.k, torch.Tensor) else self.k.stop - self.k.start
        pairs = nq * nk // 2 if self.causal else nq * nk
        return pairs + _CALL + (0 if self.first else _MERGE_PER_QUERY * nq)


def plan(exit: np.ndarray, depth: np.ndarray, window: int | None, both_ways: Blocks | None = None) -> list[Piece]:
    """Pieces that cover every visible pair exactly once; the first piece of each query precedes its others."""
    if window is not None and window <= int(depth.max()):
        return blocks(exit, depth, window, both_ways)
    pieces = cascade(exit, depth, both_ways)
    tokens = len(exit)
    visible = int(depth.sum()) + tokens
    blocks_at_best = visible + tokens * (_BLOCK // 2 + _MERGE_PER_QUERY) + 2 * _CALL * -(-tokens // _BLOCK)
    if sum(piece.cost() for piece in pieces) > 1.5 * blocks_at_best:
        return blocks(exit, depth, None, both_ways)
    return pieces


def last_queries(pieces: list[Piece], first_query: int) -> list[Piece]:
    """The part of a plan whose queries are tokens first_query.., counted from there; keys stay as they are."""
    kept: list[Piece] = []
    for piece in pieces:
        hidden = max(0, first_query - piece.q.start)
        if piece.q.stop <= first_query:
            continue
        queries = slice(piece.q.start + hidden - first_query, piece.q.stop - first_query)
        if piece.causal and hidden:
            own = slice(first_query, piece.q.stop)
            kept.append(Piece(queries, own, first=True, causal=True))
            kept.append(Piece(queries, slice(piece.q.start, first_query), first=False))
        else:
            bias = None if piece.bias is None else piece.bias[hidden:]
            kept.append(replace(piece, q=queries, bias=bias))
    return _own_tokens_first(kept)


def cascade(exit: np.ndarray, depth: np.ndarray, both_ways: Blocks | None = None) -> list[Piece]:
    """Per node self-attention, per internal node one rectangle; see the module docstring."""
    tokens = len(exit)
    node_end = _node_ends(exit, depth)
    pieces: list[Piece] = []
    start = 0
    while start < tokens:
        stop = int(exit[start])
        if stop - start <= _UNIT:
            while stop < tokens and depth[stop] == depth[start] and exit[stop] - start <= _UNIT:
                stop = int(exit[stop])
            pieces.append(_square(exit, depth, start, stop, both_ways))
            start = stop
            continue
        end = int(node_end[start])
        pieces.extend(_node(start, end, both_ways))
        if stop > end:
            pieces.append(Piece(slice(end, stop), slice(start, end), first=False))
        start = end
    return _own_tokens_first(pieces)


def _node(start: int, end: int, both_ways: Blocks | None) -> list[Piece]:
    """A node among its own tokens, in rows of `_BLOCK` queries: rectangles run faster than large causal squares."""
    pieces: list[Piece] = []
    causal_start = start
    for block_start, block_end in [*_longer_blocks(start, end, both_ways), (end, end)]:
        for row in range(causal_start, block_start, _BLOCK):
            queries = slice(row, min(row + _BLOCK, block_start))
            pieces.append(Piece(queries, queries, first=True, causal=True))
            if row > start:
                pieces.append(Piece(queries, slice(start, row), first=False))
        if block_end > block_start:
            pieces.append(Piece(slice(block_start, block_end), slice(start, block_end), first=True))
        causal_start = block_end
    return pieces


def _longer_blocks(start: int, stop: int, both_ways: Blocks | None) -> list[tuple[int, int]]:
    """(start, stop) of the blocks among tokens [start, stop) that have more than one."""
    if both_ways is None:
        return []
    ends, lengths = np.unique(both_ways.reach[start:stop], return_counts=True)
    return [(end - length, end) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True) if length > 1]


def _own_tokens_first(pieces: list[Piece]) -> list[Piece]:
    """Squares before rectangles, so that every query has a partial result before one is merged into it."""
    return [p for p in pieces if p.first] + [p for p in pieces if not p.first]


def _node_ends(exit: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """[T] exclusive end of the node that each token belongs to."""
    index = np.arange(1, len(exit))
    continues = (exit[1:] == exit[:-1]) & (depth[1:] == depth[:-1] + 1) & (index < exit[:-1])
    ends = np.append(np.flatnonzero(~continues) + 1, len(exit))
    return ends[np.searchsorted(ends, np.arange(len(exit)), side="right")]


def _square(exit: np.ndarray, depth: np.ndarray, start: int, stop: int, both_ways: Blocks | None) -> Piece:
    """A few small subtrees, tokens [start, stop), among themselves."""
    span = slice(start, stop)
    keys = np.arange(start, stop)
    visible = _visible(exit, depth, keys, keys, None, both_ways)
    if visible[-1].all() and not _longer_blocks(start, stop, both_ways):  # one path
        return Piece(span, span, first=True, causal=True)
    return Piece(span, span, first=True, bias=_bias(visible))


def blocks(exit: np.ndarray, depth: np.ndarray, window: int | None, both_ways: Blocks | None = None) -> list[Piece]:
    """Per block of queries: one mask-free piece for the keys that all of them see, one masked piece for the rest."""
    tokens = len(exit)
    path = np.empty(int(depth.max()) + 1, dtype=np.int64)  # layout indices of the ancestors of the next token
    pieces: list[Piece] = []
    for start, stop in pairwise(_cuts(tokens, both_ways)):
        queries = np.arange(start, stop)
        shallowest = int(depth[start:stop].min())
        lowest = 0 if window is None else max(0, shallowest - window + 1)
        ancestors = path[lowest : depth[start]]
        visible = _visible(exit, depth, queries, ancestors, window, both_ways)
        shared = visible.all(axis=0)
        partial = visible.any(axis=0) & ~shared
        keys = np.concatenate([ancestors[partial], queries])
        bias = _bias(_visible(exit, depth, queries, keys, window, both_ways))
        pieces.append(Piece(slice(start, stop), _keys(keys), first=True, bias=bias))
        if shared.any():
            pieces.append(Piece(slice(start, stop), _keys(ancestors[shared]), first=False))
        path[depth[start:stop]] = queries  # preorder: the last token written at a depth is the open one
    return pieces


def _cuts(tokens: int, both_ways: Blocks | None) -> list[int]:
    """Where blocks of queries begin, and the end of the last one."""
    if both_ways is None:
        return [*range(0, tokens, _BLOCK), tokens]
    cuts = [0]
    while cuts[-1] < tokens:
        most = min(cuts[-1] + _BLOCK, tokens)
        stop = cut_before(both_ways.reach, most)
        cuts.append(stop if stop > cuts[-1] else cut_after(both_ways.reach, most))
    return cuts


def _visible(
    exit: np.ndarray,
    depth: np.ndarray,
    queries: np.ndarray,
    keys: np.ndarray,
    window: int | None,
    both_ways: Blocks | None,
) -> np.ndarray:
    """Bool [nq, nk]."""
    last = queries if both_ways is None else both_ways.reach[queries] - 1
    visible = (keys[None, :] <= last[:, None]) & (queries[:, None] < exit[keys][None, :])
    if window is not None:
        near = depth[queries][:, None] - depth[keys][None, :] < window
        if both_ways is not None and both_ways.is_whole:
            near |= last[:, None] == both_ways.reach[keys][None, :] - 1
        visible &= near
    return visible


def _bias(visible: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))


def _keys(index: np.ndarray) -> slice | torch.Tensor:
    """A contiguous run as a slice (no copy), anything else as an index."""
    if index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index)
