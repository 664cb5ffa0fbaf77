"""Where the states of one packed row start, fork and leave: what all recurrent operations on trees go by.

A recurrent layer carries a state from token to token; on a tree, a token starts from its parent's state, and every
child of a fork starts from the same one. A row may begin in the middle of a sequence: then one state *comes in* before
all tokens that have no parent in the row. States *leave* it behind tokens at which other rows go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, starmap
from typing import Any

import numpy as np
import torch

from dta_plugin.upload import upload


@dataclass(frozen=True, slots=True, eq=False)
class StatePlan:
    """One row of T tokens in depth-first order.

    Attributes:
        parent: int64 [T] of each token, the token before it in its sequence; -1 where the state that comes in is.
        leaves: int64 [K] tokens behind which states leave the row, ascending.
    """

    parent: np.ndarray
    leaves: np.ndarray
    _cache: dict[object, Any] = field(default_factory=dict)

    @classmethod
    def from_depth(cls, depth: np.ndarray, leaves: Sequence[int] | np.ndarray = ()) -> StatePlan:
        """The plan of a row in depth-first preorder. depth: int64 [T], which tokens without a parent have least."""
        return cls(_parents(depth), np.asarray(leaves, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.parent)

    def cached(self, key: object, build: Callable[[], Any]) -> Any:
        """What an operation derives from the plan, made once for all layers and passes."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]

    def ancestors(self, count: int, device: torch.device) -> torch.Tensor:
        """int64 [T, count] the nearest ancestors of every token, its parent first.

        They are places in the `count` last tokens before the row, in their order, followed by the row itself.
        """
        return self.cached(("ancestors", count, device), lambda: upload([_ancestors(self.parent, count)], device)[0])

    def blocks(self, size: int) -> Blocks:
        """The row in blocks of at most `size` tokens."""
        return self.cached(("blocks", size), lambda: _blocks(self, size))

    def nodes(self) -> Blocks:
        """The row in runs of tokens between which nothing forks, joins or leaves, however long."""
        return self.blocks(max(1, len(self)))

    def ends(self) -> np.ndarray:
        """int64 [P] the nodes at which paths from the top of the row end: no child follows, or a state leaves."""
        return self.cached("ends", lambda: _ends(self.nodes()))

    def path_tokens(self) -> int:
        """Tokens on all paths, what they share counted in each."""
        return self.cached("path tokens", lambda: _path_tokens(self.nodes(), self.ends()))


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A row cut into B blocks: runs of tokens straight down the tree, behind whose last tokens alone states go on.

    Blocks are in the order of their level, the number of blocks above them, so that those of a level are a slice and
    all of them can take one step of a scan together.

    Attributes:
        start, length: int64 [B] first token of the row, and how many.
        parent: int64 [B] the block whose last state each begins with, -1 for the state that comes in.
        levels: slices of the blocks, top to bottom.
        leaves: int64 [K] the block behind which each state leaves the row.
    """

    start: np.ndarray
    length: np.ndarray
    parent: np.ndarray
    levels: list[slice]
    leaves: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def _parents(depth: np.ndarray) -> np.ndarray:
    """In preorder, a token one deeper than the one before it is its child; others start a run of their own."""
    parent = np.arange(-1, len(depth) - 1)
    starts = np.flatnonzero(np.diff(depth, prepend=depth[:1] - 2) != 1)
    runs: list[tuple[int, int]] = []  # (depth, token) at which those on the way down to here start
    for start, first in zip(starts.tolist(), depth[starts].tolist(), strict=True):
        while runs and runs[-1][0] >= first:
            runs.pop()
        parent[start] = runs[-1][1] + first - 1 - runs[-1][0] if runs else -1
        runs.append((first, start))
    return parent


def _ancestors(parent: np.ndarray, count: int) -> np.ndarray:
    above = np.concatenate([np.arange(-1, count - 1), np.where(parent < 0, count - 1, parent + count)])
    found = np.empty((len(parent), count), dtype=np.int64)
    place = np.arange(count, count + len(parent))
    for step in range(count):
        place = above[place]
        found[:, step] = place
    return found


def _blocks(plan: StatePlan, size: int) -> Blocks:
    parent = plan.parent
    total = len(parent)
    children = np.bincount(parent[parent >= 0], minlength=total)
    goes_on = np.zeros(total, dtype=bool)  # to the token behind it, and nowhere else
    goes_on[:-1] = (parent[1:] == np.arange(total - 1)) & (children[:-1] == 1)
    goes_on[plan.leaves] = False
    node = np.flatnonzero(~np.concatenate([[False], goes_on[:-1]]))
    lengths = np.diff(np.append(node, total))
    pieces = -(-lengths // size)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.repeat(node, pieces) + (np.arange(pieces.sum()) - first) * size
    length = np.diff(np.append(start, total))
    block_of = np.repeat(np.arange(len(start)), length)
    above = np.where(parent[start] < 0, -1, block_of[parent[start]])
    level = np.zeros(len(start), dtype=np.int64)
    for block, over in enumerate(above.tolist()):
        level[block] = level[over] + 1 if over >= 0 else 0
    order = np.argsort(level, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(level))]).tolist()
    return Blocks(
        start[order],
        length[order],
        np.where(above[order] < 0, -1, rank[above[order]]),
        list(starmap(slice, pairwise(bounds))),
        rank[block_of[plan.leaves]],
    )


def _ends(nodes: Blocks) -> np.ndarray:
    has_child = np.zeros(len(nodes), dtype=bool)
    has_child[nodes.parent[nodes.parent >= 0]] = True
    return np.union1d(np.flatnonzero(~has_child), nodes.leaves)


def _path_tokens(nodes: Blocks, ends: np.ndarray) -> int:
    down_to = nodes.length.copy()
    for level in nodes.levels[1:]:
        down_to[level] += down_to[nodes.parent[level]]
    return int(down_to[ends].sum())
