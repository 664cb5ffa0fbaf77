"""The plan of a depth-first executor that runs one path at a time, in the manner of AReaL-DTA (arXiv 2602.00482).

Every chunk is one run of tokens straight down the tree, from the root or a fork to a leaf, cut where it exceeds the
budget; siblings never share a model call. For `run_streamed(..., planner=one_path_plan)`, which gives this contender
everything else that `plan_chunks` gets: the arena, graphs of the last chunks kept as far as the budget allows, and the
order of children that lets the longest stem stay in memory. Of two ways to go on at a fork the cheaper is taken: down
the first child to its leaf, or, where that child has forks of its own, to stop, so that the shared part can be rebuilt
without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.streaming.chunk_plan import Chunk, ChunkPlan
from dta_plugin.tree.trie import PrefixTree


def one_path_plan(tree: PrefixTree, budget: int, keeps_graphs: bool = True) -> ChunkPlan:
    """Chunks of at most `budget` tokens of one path each. keeps_graphs: the last that fit into the budget do."""
    if budget < 1:
        raise InvalidInputError(f"Got a budget of {budget} tokens per chunk. Expected at least 1.")
    plans = [_plan(tree, budget, keeps_graphs, through_forks) for through_forks in (True, False)]
    return min(plans, key=lambda plan: (plan.recomputed_tokens + plan.rebuilt_tokens, len(plan.chunks)))


@dataclass(slots=True, eq=False)
class _Run:
    """A chunk under construction. deepest_child: largest first_depth among the runs that hang off it."""

    index: int
    parent: int
    first_depth: int
    size: int = 0
    parts: list[np.ndarray] = field(default_factory=list)
    deepest_child: int = 0

    def close(self) -> Chunk:
        cached = np.arange(max(self.deepest_child - self.first_depth, 0))
        return Chunk(np.concatenate(self.parts), self.parent, self.first_depth, cached)


def _plan(tree: PrefixTree, budget: int, keeps_graphs: bool, through_forks: bool) -> ChunkPlan:
    children, stem_below = _children(tree)
    runs: list[_Run] = []
    tasks: list[tuple[int, int, bool]] = [(root, -1, False) for root in reversed(children[-1])]
    while tasks:
        node, above, goes_on = tasks.pop()  # `above`: the run that holds the last token before the node
        start, stop = int(tree.node_start[node]), int(tree.node_start[node + 1])
        while start < stop:
            if not goes_on or runs[above].size == budget:
                runs.append(_Run(len(runs), above, int(tree.depth[start])))
                if above >= 0:
                    runs[above].deepest_child = max(runs[above].deepest_child, int(tree.depth[start]))
                above, goes_on = len(runs) - 1, True
            taken = min(stop - start, budget - runs[above].size)
            runs[above].parts.append(np.arange(start, start + taken))
            runs[above].size += taken
            start += taken
        below = children[node]
        continued = bool(below) and (through_forks or len(below) == 1 or stem_below[below[0]] == 0)
        tasks += [(child, above, continued and child == below[0]) for child in reversed(below)]
    chunks = [run.close() for run in runs]
    first_kept, kept = len(chunks), 0
    while keeps_graphs and first_kept and kept + len(chunks[first_kept - 1]) <= budget:
        first_kept -= 1
        kept += len(chunks[first_kept])
    return ChunkPlan(chunks, first_kept)


def _children(tree: PrefixTree) -> tuple[list[list[int]], list[int]]:
    """Children of every node, of the forest last: leaves first, the longest stem last. And the length of that stem:
    the longest run of tokens down from a node that other runs hang off."""
    count = tree.num_nodes
    above = tree.parent[tree.node_start[:-1]]
    parents = np.where(above < 0, count, np.searchsorted(tree.node_start, above, side="right") - 1)
    children: list[list[int]] = [[] for _ in range(count + 1)]
    stem_below = [0] * count
    for node in reversed(range(count)):  # preorder: children come after their parent
        if children[node]:
            length = int(tree.node_start[node + 1] - tree.node_start[node])
            stem_below[node] = length + max(stem_below[child] for child in children[node])
        children[node].sort(key=stem_below.__getitem__)
        children[parents[node]].append(node)
    children[count].sort(key=stem_below.__getitem__)
    return children, stem_below
