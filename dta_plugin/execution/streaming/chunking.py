"""Cut a tree into chunks: siblings that fit together, long nodes in parts, the longest stem last.

Tokens that attend both ways (`PrefixTree.reach`, the tokens of an image) are never cut apart: each sees all of the
others, which therefore have to be in its chunk. Such a block that exceeds the budget makes a chunk of its size.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from dta_plugin.attention.blocks import cut_after, cut_before
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.streaming.boundary_chunk import split_boundary_chunk
from dta_plugin.execution.streaming.chunk_plan import Chunk, ChunkPlan
from dta_plugin.tree.trie import PrefixTree


def plan_chunks(tree: PrefixTree, budget: int, keeps_graphs: bool = True) -> ChunkPlan:
    """Chunks of at most `budget` tokens, or as many as the longest block of tokens that attend both ways has.

    keeps_graphs: the last ones do, as many as fit into the budget.
    """
    if budget < 1:
        raise InvalidInputError(f"Got a budget of {budget} tokens per chunk. Expected at least 1.")
    chunks = _TreeCutter(tree, budget).chunks()
    if not keeps_graphs:
        return ChunkPlan(chunks, len(chunks))
    first_kept, room = len(chunks), budget
    while first_kept and len(chunks[first_kept - 1]) <= room:
        first_kept -= 1
        room -= len(chunks[first_kept])
    return ChunkPlan(split_boundary_chunk(tree, chunks, first_kept, room, budget), first_kept)


@dataclass(slots=True, eq=False)
class _OpenChunk:
    """A chunk under construction: runs [start, stop) of layout tokens, and which of them are stem."""

    index: int
    parent: int
    first_depth: int
    size: int = 0
    runs: list[tuple[int, int, bool]] = field(default_factory=list)

    def add(self, start: int, stop: int, is_stem: bool) -> None:
        self.runs.append((start, stop, is_stem))
        self.size += stop - start

    def close(self, deepest_child: int) -> Chunk:
        """deepest_child: largest first_depth among the chunks that hang off this one."""
        runs = sorted(self.runs)
        tokens = np.concatenate([np.arange(start, stop) for start, stop, _ in runs])
        is_stem = np.concatenate([np.full(stop - start, on_stem) for start, stop, on_stem in runs])
        cached = np.flatnonzero(is_stem)[: max(deepest_child - self.first_depth, 0)]
        return Chunk(tokens, self.parent, self.first_depth, cached)


class _TreeCutter:
    """Walks the nodes whose subtrees exceed the budget; smaller subtrees are never cut."""

    def __init__(self, tree: PrefixTree, budget: int) -> None:
        self.budget, self.reach = budget, tree.reach
        self.start, self.stop = tree.node_start[:-1].tolist(), tree.node_start[1:].tolist()
        self.size = (tree.exit[tree.node_start[:-1]] - tree.node_start[:-1]).tolist()
        self.depth = tree.depth[tree.node_start[:-1]].tolist()
        above = tree.parent[tree.node_start[:-1]]
        parent_node = np.searchsorted(tree.node_start, above, side="right") - 1
        self.children: dict[int, list[int]] = {}
        for node, parent in enumerate(np.where(above < 0, -1, parent_node).tolist()):
            self.children.setdefault(parent, []).append(node)
        self.stem_below = self._stem_below()
        self.open: list[_OpenChunk] = []

    def chunks(self) -> list[Chunk]:
        tasks = self._below(-1, None, parent=-1, depth=0)[::-1]
        while tasks:
            node, chunk, parent = tasks.pop()
            chunk = self._lay_stem(node, chunk, parent)
            depth = self.depth[node] + self.stop[node] - self.start[node]
            tasks += self._below(node, chunk, chunk.index, depth)[::-1]
        deepest = [0] * len(self.open)
        for chunk in self.open:
            if chunk.parent >= 0:
                deepest[chunk.parent] = max(deepest[chunk.parent], chunk.first_depth)
        return [chunk.close(depth) for chunk, depth in zip(self.open, deepest, strict=True)]

    def _lay_stem(self, node: int, chunk: _OpenChunk | None, parent: int) -> _OpenChunk:
        """Append a node's tokens to `chunk`, opening new ones where it is full; -> the chunk with its last token."""
        start = self.start[node]
        while start < self.stop[node]:
            stop = start if chunk is None else self._cut(node, start, self.budget - chunk.size)
            if chunk is None or stop <= start:
                chunk = self._new(parent, self.depth[node] + start - self.start[node])
                stop = max(self._cut(node, start, self.budget), self._first_cut(start))
            chunk.add(start, stop, is_stem=True)
            start, parent = stop, chunk.index
        assert chunk is not None
        return chunk

    def _cut(self, node: int, start: int, room: int) -> int:
        """The end of what fits into `room` of a node's tokens from `start` on; `start` if nothing does."""
        stop = min(self.stop[node], start + room)
        return stop if self.reach is None or room <= 0 else cut_before(self.reach, stop)

    def _first_cut(self, start: int) -> int:
        """The end of the shortest part that can begin with `start`."""
        return start + 1 if self.reach is None else cut_after(self.reach, start + 1)

    def _below(
        self, node: int, chunk: _OpenChunk | None, parent: int, depth: int
    ) -> list[tuple[int, _OpenChunk | None, int]]:
        """Place a node's small subtrees; -> (child, chunk it may continue, parent chunk) of the others, in order."""
        children = sorted(self.children.get(node, []), key=self.size.__getitem__, reverse=True)
        small = [child for child in children if self.size[child] <= self.budget]
        large = [child for child in children if self.size[child] > self.budget]
        left = []
        for child in small:
            if chunk is not None and chunk.size + self.size[child] <= self.budget:
                self._add_subtree(chunk, child)
            else:
                left.append(child)
        for siblings in self._batches(left):
            batch = self._new(parent, depth)
            for child in siblings:
                self._add_subtree(batch, child)
        large.sort(key=self.stem_below.__getitem__)
        continued = chunk if not left else None
        return [(child, continued if rank == 0 else None, parent) for rank, child in enumerate(large)]

    def _batches(self, subtrees: list[int]) -> list[list[int]]:
        """Group subtrees, largest first, within the budget: into the emptiest group if it fits; fullest group last."""
        groups: list[tuple[int, int, list[int]]] = []
        for rank, child in enumerate(subtrees):
            if groups and groups[0][0] + self.size[child] <= self.budget:
                used, first, group = groups[0]
                group.append(child)
                heapq.heapreplace(groups, (used + self.size[child], first, group))
            else:
                heapq.heappush(groups, (self.size[child], rank, [child]))
        return [group for _, _, group in sorted(groups)]

    def _add_subtree(self, chunk: _OpenChunk, node: int) -> None:
        chunk.add(self.start[node], self.start[node] + self.size[node], is_stem=False)

    def _new(self, parent: int, first_depth: int) -> _OpenChunk:
        self.open.append(_OpenChunk(len(self.open), parent, first_depth))
        return self.open[-1]

    def _stem_below(self) -> list[int]:
        """Per node the longest run of tokens down from it through nodes that exceed the budget."""
        longest = [0] * len(self.start)
        for node in reversed(range(len(self.start))):  # preorder: children come after their parent
            large = [longest[child] for child in self.children.get(node, []) if self.size[child] > self.budget]
            longest[node] = self.stop[node] - self.start[node] + max(large, default=0)
        return longest
