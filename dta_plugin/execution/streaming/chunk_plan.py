"""A tree cut into chunks that run one after the other within a token budget; see chunking.py for how.

A *chunk* is one model call: a run of tokens straight down the tree (its *stem*), with complete subtrees hanging off
it, or just complete sibling subtrees. Every token is in exactly one chunk. It attends to itself and to the keys and
values of its ancestors, which earlier chunks have left. What a chunk leaves, its *cached* tokens, is the part of its
stem that later chunks hang off: one token per depth, so the cache holds one root-to-leaf path.

Chunks run in order to compute log-probs. The backward pass runs them in reverse: the last ones still have their graphs,
the others are run again. Where the path above a chunk is no longer the one in memory, its cached tokens are run once
more without gradient; visiting the child with the longest stem last keeps that rare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One model call.

    tokens: int64 [C] layout indices, ascending. parent: index of the chunk whose stem it hangs off, -1 at the top.
    first_depth: number of its ancestors. cached: int64 [S] positions in `tokens`, at depths first_depth..
        first_depth + S - 1, that later chunks hang off; empty if there are none.
    """

    tokens: np.ndarray
    parent: int
    first_depth: int
    cached: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPlan:
    """Chunks in the order of the first pass. Those from `first_kept` on keep their graphs for the backward pass."""

    chunks: list[Chunk]
    first_kept: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that run forward a second time, with gradient."""
        return sum(map(len, self.chunks[: self.first_kept]))

    @property
    def peak_tokens(self) -> int:
        """Most tokens whose activations are alive at once."""
        return max(self.tokens - self.recomputed_tokens, max(map(len, self.chunks)))

    @property
    def arena_tokens(self) -> int:
        """Most keys that a chunk sees: its ancestors and itself."""
        return max(chunk.first_depth + len(chunk) for chunk in self.chunks)

    def rebuilds(self) -> list[list[Rebuild]]:
        """Per chunk, what runs once more before it goes backward, because other branches took its place in memory."""
        path = CachedPath(self)
        for index in range(len(self.chunks)):
            path.run(index)
        rebuilds: list[list[Rebuild]] = []
        for index in reversed(range(len(self.chunks))):
            rebuilds.append(list(path.restore(index)))
            path.leave(index)
        return rebuilds[::-1]

    @property
    def rebuilt_tokens(self) -> int:
        """Cached tokens that run once more without gradient."""
        return sum(len(self.chunks[r.chunk].cached) - r.start for r in chain.from_iterable(self.rebuilds()))


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The cached tokens of a chunk from number `start` on: the part that is no longer in memory."""

    chunk: int
    start: int


@dataclass(slots=True, eq=False)
class CachedPath:
    """Whose cached tokens lie at each depth of the memory that holds one root-to-leaf path."""

    plan: ChunkPlan
    owner: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.owner = np.full(self.plan.arena_tokens, -1, dtype=np.int64)

    def run(self, index: int) -> None:
        """Chunk `index` has run: its cached tokens are in memory, what was below is not."""
        chunk = self.plan.chunks[index]
        stop = chunk.first_depth + len(chunk.cached)
        self.owner[chunk.first_depth : stop] = index
        self.owner[stop:] = -1

    def leave(self, index: int) -> None:
        """Chunk `index` has gone backward: only its ancestors are in memory."""
        self.owner[self.plan.chunks[index].first_depth :] = -1

    def restore(self, index: int) -> Iterator[Rebuild]:
        """What has to run again before chunk `index`, from the top; each part is marked as run.

        A chunk that runs takes all slots below its own: what is in place has its ancestors in place, too.
        """
        missing: list[int] = []
        below = self.plan.chunks[index]
        while below.parent >= 0 and self.owner[below.first_depth - 1] != below.parent:
            missing.append(below.parent)
            below = self.plan.chunks[below.parent]
        for ancestor in reversed(missing):
            chunk = self.plan.chunks[ancestor]
            slots = self.owner[chunk.first_depth : chunk.first_depth + len(chunk.cached)]
            yield Rebuild(ancestor, int((slots != ancestor).argmax()))
            self.run(ancestor)
