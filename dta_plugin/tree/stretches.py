"""Stretches: runs of tokens that the same sequences pass through. They are what pictures of a tree draw as boxes.

A node of a `PrefixTree` is one stretch, or several where sequences end inside it. So every sequence ends at the end of
a stretch, and between two ends or forks nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """The K stretches of a tree of S sequences, in depth-first order. All arrays are int64.

    starts: [K] layout index of the first token. tokens: [K] their number. parent: [K] the stretch above, -1 at a root.
    depth: [K] position of the first token. sequences: [K] that pass through. subtree: [K] tokens from the first one
    down. row: [K] place, in depth-first order, of the first of its sequences. ends: [S] the stretch with which each
    sequence ends, in the caller's order.
    """

    starts: np.ndarray
    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    sequences: np.ndarray
    subtree: np.ndarray
    row: np.ndarray
    ends: np.ndarray

    @classmethod
    def from_tree(cls, tree: PrefixTree) -> Stretches:
        is_start = np.zeros(tree.tree_tokens, dtype=bool)
        is_start[tree.node_start[:-1]] = True
        is_start[1:] |= tree.multiplicity[1:] != tree.multiplicity[:-1]
        starts = np.flatnonzero(is_start)
        last = tree.paths[tree.offsets[1:] - 1]
        # The first sequence, in depth-first order, that contains a token is the one that brought it.
        row = np.searchsorted(np.maximum.accumulate(last[tree.order] + 1), starts, side="right")
        return cls(
            starts=starts,
            tokens=np.diff(starts, append=tree.tree_tokens),
            parent=np.searchsorted(starts, tree.parent[starts], side="right") - 1,
            depth=tree.depth[starts].astype(np.int64),
            sequences=tree.multiplicity[starts].astype(np.int64),
            subtree=tree.exit[starts] - starts,
            row=row,
            ends=np.searchsorted(starts, last, side="right") - 1,
        )

    def __len__(self) -> int:
        return len(self.starts)
