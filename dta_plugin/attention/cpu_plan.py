"""Which (queries x keys) rectangles the CPU path computes, so that no T x T mask is ever built.

Two ways to cover the visible pairs of a tree, both exact:

* `cascade`: every node attends causally to itself, and every internal node is one mask-free rectangle (all its
  descendants, a contiguous slice of queries, x its keys). Long nodes go row by row; small subtrees are merged into one
  masked square. Best for the usual trees: few long nodes.
* `blocks`: every block of queries attends to its path, gathered, and to itself under a small mask. Serves sliding
  windows, and trees of many short internal nodes, where the cascade would merge too many partial results.

All index arrays are numpy int64; plans are made once per tree and shared by all layers and passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

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


def plan(exit: np.ndarray, depth: np.ndarray, window: int | None) -> list[Piece]:
    """Pieces that cover every visible pair exactly once; the first piece of each query precedes its others."""
    if window is not None and window <= int(depth.max()):
        return blocks(exit, depth, window)
    pieces = cascade(exit, depth)
    tokens = len(exit)
    visible = int(depth.sum()) + tokens
    blocks_at_best = visible + tokens * (_BLOCK // 2 + _MERGE_PER_QUERY) + 2 * _CALL * -(-tokens // _BLOCK)
    if sum(piece.cost() for piece in pieces) > 1.5 * blocks_at_best:
        return blocks(exit, depth, None)
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


def cascade(exit: np.ndarray, depth: np.ndarray) -> list[Piece]:
    """Per node causal self-attention, per internal node one rectangle; see the module docstring."""
    tokens = len(exit)
    node_end = _node_ends(exit, depth)
    pieces: list[Piece] = []
    start = 0
    while start < tokens:
        stop = int(exit[start])
        if stop - start <= _UNIT:
            while stop < tokens and depth[stop] == depth[start] and exit[stop] - start <= _UNIT:
                stop = int(exit[stop])
            pieces.append(_square(exit, depth, start, stop))
            start = stop
            continue
        end = int(node_end[start])
        pieces.extend(_node(start, end))
        if stop > end:
            pieces.append(Piece(slice(end, stop), slice(start, end), first=False))
        start = end
    return _own_tokens_first(pieces)


def _node(start: int, end: int) -> list[Piece]:
    """A node among its own tokens, in rows of `_BLOCK` queries: rectangles run faster than large causal squares."""
    pieces: list[Piece] = []
    for row in range(start, end, _BLOCK):
        queries = slice(row, min(row + _BLOCK, end))
        pieces.append(Piece(queries, queries, first=True, causal=True))
        if row > start:
            pieces.append(Piece(queries, slice(start, row), first=False))
    return pieces


def _own_tokens_first(pieces: list[Piece]) -> list[Piece]:
    """Squares before rectangles, so that every query has a partial result before one is merged into it."""
    return [p for p in pieces if p.first] + [p for p in pieces if not p.first]


def _node_ends(exit: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """[T] exclusive end of the node that each token belongs to."""
    index = np.arange(1, len(exit))
    continues = (exit[1:] == exit[:-1]) & (depth[1:] == depth[:-1] + 1) & (index < exit[:-1])
    ends = np.append(np.flatnonzero(~continues) + 1, len(exit))
    return ends[np.searchsorted(ends, np.arange(len(exit)), side="right")]


def _square(exit: np.ndarray, depth: np.ndarray, start: int, stop: int) -> Piece:
    """A few small subtrees, tokens [start, stop), among themselves."""
    span = slice(start, stop)
    keys = np.arange(start, stop)
    visible = _visible(exit, depth, keys, keys, None)
    if visible[-1].all():  # one path
        return Piece(span, span, first=True, causal=True)
    return Piece(span, span, first=True, bias=_bias(visible))


def blocks(exit: np.ndarray, depth: np.ndarray, window: int | None) -> list[Piece]:
    """Per block of queries: one mask-free piece for the keys that all of them see, one masked piece for the rest."""
    tokens = len(exit)
    path = np.empty(int(depth.max()) + 1, dtype=np.int64)  # layout indices of the ancestors of the next token
    pieces: list[Piece] = []
    for start in range(0, tokens, _BLOCK):
        stop = min(start + _BLOCK, tokens)
        queries = np.arange(start, stop)
        shallowest = int(depth[start:stop].min())
        lowest = 0 if window is None else max(0, shallowest - window + 1)
        ancestors = path[lowest : depth[start]]
        visible = _visible(exit, depth, queries, ancestors, window)
        shared = visible.all(axis=0)
        partial = visible.any(axis=0) & ~shared
        keys = np.concatenate([ancestors[partial], queries])
        bias = _bias(_visible(exit, depth, queries, keys, window))
        pieces.append(Piece(slice(start, stop), _keys(keys), first=True, bias=bias))
        if shared.any():
            pieces.append(Piece(slice(start, stop), _keys(ancestors[shared]), first=False))
        path[depth[start:stop]] = queries  # preorder: the last token written at a depth is the open one
    return pieces


def _visible(
    exit: np.ndarray, depth: np.ndarray, queries: np.ndarray, keys: np.ndarray, window: int | None
) -> np.ndarray:
    """Bool [nq, nk]."""
    visible = (keys[None, :] <= queries[:, None]) & (queries[:, None] < exit[keys][None, :])
    if window is not None:
        visible &= depth[queries][:, None] - depth[keys][None, :] < window
    return visible


def _bias(visible: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))


def _keys(index: np.ndarray) -> slice | torch.Tensor:
    """A contiguous run as a slice (no copy), anything else as an index."""
    if index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index)
