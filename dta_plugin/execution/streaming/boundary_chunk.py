"""The chunk between graphs that are dropped and graphs that are kept is cut: its tail fills the memory that is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dta_plugin.attention.blocks import cut_after
from dta_plugin.execution.streaming.chunk_plan import Chunk
from dta_plugin.tree.trie import PrefixTree

# A tail is worth a call of its own from this share of the budget.
_WORTH = 1 / 8


def split_boundary_chunk(tree: PrefixTree, chunks: list[Chunk], first_kept: int, room: int, budget: int) -> list[Chunk]:
    """The chunks with number ``first_kept - 1`` cut in two, of which the second has at most `room` tokens.

    As they were, where no tail is worth it: the first one kept is then still number `first_kept`.
    """
    if first_kept == 0:
        return chunks
    cut = first_kept - 1
    parts = _cut(tree, chunks[cut], cut, room)
    if parts is None or len(parts[1]) < _WORTH * budget:
        return chunks
    head, tail = parts
    deepest = head.first_depth + len(head.cached)  # what hangs deeper hangs off the tail

    def moved(chunk: Chunk) -> Chunk:
        is_below_tail = chunk.parent > cut or (chunk.parent == cut and chunk.first_depth > deepest)
        return replace(chunk, parent=chunk.parent + 1) if is_below_tail else chunk

    return [*chunks[:cut], head, tail, *map(moved, chunks[cut + 1 :])]


def _uncut(tree: PrefixTree, tokens: np.ndarray, start: int) -> int:
    """The first position from `start` on at which no tokens that attend both ways are cut apart."""
    if tree.reach is None or start >= len(tokens):
        return start
    return int(np.searchsorted(tokens, cut_after(tree.reach, int(tokens[start]))))


def _cut(tree: PrefixTree, chunk: Chunk, index: int, room: int) -> tuple[Chunk, Chunk] | None:
    """The chunk's head and tail; None if it has no place to be cut at."""
    tokens, size = chunk.tokens, len(chunk)
    depth = tree.depth[tokens] - chunk.first_depth
    is_above_all = (depth == np.arange(size)) & (tree.exit[tokens] > tokens[-1])
    stem = size if is_above_all.all() else int(is_above_all.argmin())  # tokens straight down, above all that follow
    if stem == size:
        start = _uncut(tree, tokens, max(size - room, 1))
    elif len(chunk.cached) and chunk.cached[-1] >= stem:
        return None  # the path goes on beyond a fork inside
    else:
        starts = np.flatnonzero(depth == stem)  # of the subtrees below the stem
        starts = starts[(starts >= max(size - room, 1))]
        if not len(starts):
            return None
        start = int(starts[0])
    if start >= size:
        return None
    length = start if stem == size else stem
    head = Chunk(tokens[:start], chunk.parent, chunk.first_depth, np.arange(length))
    tail_cached = chunk.cached[chunk.cached >= start] - start
    parent = index if length else chunk.parent
    return head, Chunk(tokens[start:], parent, chunk.first_depth + length, tail_cached)
