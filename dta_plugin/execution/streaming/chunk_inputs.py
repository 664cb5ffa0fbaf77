"""The chunks of a plan as tensors: what one model call of streamed execution takes, and which log-probs it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dta_plugin.attention.mask import HostArrays
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree
from dta_plugin.upload import upload


@dataclass(frozen=True, slots=True, eq=False)
class ChunkInputs:
    """A chunk, or its cached tokens, as tensors. first: number of its ancestors.

    cached: int64 [S] positions in the chunk, see `Chunk` in chunk_plan.py. edges: int64 [E'] those whose rows are in
    it; rows: [R'] positions in the chunk. temperature: [R'], where rows have their own. host: exit and depth, and
    host_row_of_edge, in the CPU's memory, as are leaves: [K] positions behind which later chunks begin. images: of its
    tokens, if the tree has any. reach, host_reach: [C], where tokens attend both ways, as positions in the chunk; no
    chunk has a part of a block.
    """

    input_ids: torch.Tensor
    depth: torch.Tensor
    exit: torch.Tensor
    first: int
    cached: torch.Tensor
    edges: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    row_of_edge: torch.Tensor
    host: HostArrays
    host_row_of_edge: np.ndarray
    leaves: np.ndarray
    temperature: torch.Tensor | None = None
    images: TreeImages | None = None
    reach: torch.Tensor | None = None
    host_reach: np.ndarray | None = None


class PlanInputs:
    """Chunks of a plan as tensors on the edges' device, made when they are needed."""

    def __init__(self, tree: PrefixTree, edges: ScoredEdges, plan: ChunkPlan, images: TreeImages | None = None) -> None:
        self.images = images
        self.tree, self.plan, self.device = tree, plan, edges.target.device
        self.target, self.rows, self.row_of_edge = edges.host.target, edges.host.rows, edges.host.row_of_edge
        self.temperature = edges.temperature
        chunk_of = np.empty(tree.tree_tokens, dtype=np.int64)
        for index, chunk in enumerate(plan.chunks):
            chunk_of[chunk.tokens] = index
        chunk_of_edge = chunk_of[self.rows[self.row_of_edge]]
        order = np.argsort(chunk_of_edge, kind="stable")
        self.edges_of = np.split(order, np.searchsorted(chunk_of_edge[order], np.arange(1, len(plan.chunks))))
        self.begin_below: list[set[int]] = [set() for _ in plan.chunks]  # depths at which chunks hang off each
        for chunk in plan.chunks:
            if chunk.parent >= 0:
                self.begin_below[chunk.parent].add(chunk.first_depth)

    def edges(self, index: int) -> torch.Tensor:
        """int64 [E'] the edges whose rows are in a chunk."""
        return upload([self.edges_of[index]], self.device)[0]

    def chunk(self, index: int) -> ChunkInputs:
        """All of a chunk."""
        chunk, edges = self.plan.chunks[index], self.edges_of[index]
        rows, row_of_edge = np.unique(self.row_of_edge[edges], return_inverse=True)
        positions = np.searchsorted(chunk.tokens, self.rows[rows])
        temperature = None if self.temperature is None else self.temperature[upload([rows], self.device)[0]]
        leaves = chunk.cached[self._forks(index, chunk.first_depth)]
        arrays = (chunk.cached, edges, positions, row_of_edge, leaves)
        return replace(self._inputs(chunk.tokens, chunk.first_depth, *arrays), temperature=temperature)

    def cached_tokens(self, index: int, start: int) -> ChunkInputs:
        """Only the cached tokens of a chunk, from number `start` on; nothing scored."""
        chunk, nothing = self.plan.chunks[index], np.empty(0, dtype=np.int64)
        tokens = chunk.tokens[chunk.cached[start:]]
        first = chunk.first_depth + start
        leaves = self._forks(index, first)
        return self._inputs(tokens, first, np.arange(len(tokens)), nothing, nothing, nothing, leaves)

    def dummy(self) -> ChunkInputs:
        """One token, for a rank that calls the model only because others do."""
        zero, nothing = (torch.zeros(size, dtype=torch.int64, device=self.device) for size in (1, 0))
        one = np.zeros(1, dtype=np.int64)
        return ChunkInputs(zero, zero, zero + 1, 0, *(nothing,) * 5, (one + 1, one), one[:0], one[:0])

    def _forks(self, index: int, first: int) -> np.ndarray:
        """int64 [K] of the cached tokens of a chunk from depth `first` on, those behind which later chunks begin."""
        depths = sorted(depth for depth in self.begin_below[index] if depth > first)
        return np.array(depths, dtype=np.int64) - first - 1

    def _inputs(
        self,
        tokens: np.ndarray,
        first: int,
        cached: np.ndarray,
        edges: np.ndarray,
        rows: np.ndarray,
        row_of_edge: np.ndarray,
        leaves: np.ndarray,
    ) -> ChunkInputs:
        tree = self.tree
        exit_ = np.searchsorted(tokens, tree.exit[tokens])
        targets = tree.tokens[self.target[edges]]
        depth = tree.depth[tokens]
        arrays = {
            "input_ids": tree.tokens[tokens],
            "depth": depth,
            "exit": exit_,
            "cached": cached,
            "edges": edges,
            "targets": targets,
            "rows": rows,
            "row_of_edge": row_of_edge,
        }
        reach = None if tree.reach is None else np.searchsorted(tokens, tree.reach[tokens])
        if reach is not None:
            arrays["reach"] = reach
        tensors = dict(zip(arrays, upload(list(arrays.values()), self.device), strict=True))
        images = None if self.images is None else self.images.at(tokens)
        return ChunkInputs(
            **tensors,
            first=first,
            host=(exit_, depth),
            host_row_of_edge=row_of_edge,
            leaves=leaves,
            images=images,
            host_reach=reach,
        )
