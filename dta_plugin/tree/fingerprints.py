"""Fingerprints of runs of tokens on the paths of a tree: equal runs have equal ones, others differ but for chance.

A polynomial hash, doubled from one token to two, four and so on by looking up what ends at the ancestor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """ids: uint64 [T], for every layout token t, of the `length` tokens of its path that end at t.

    jumps: for 1, 2, 4.. below `length`, the ancestor that many tokens up, -1 above a root.
    """

    length: int
    ids: np.ndarray
    jumps: list[np.ndarray]

    @classmethod
    def from_tree(cls, tree: PrefixTree, length: int) -> Fingerprints:
        if length < 2 or length & (length - 1):
            raise InvalidInputError(f"run_length={length}. Expected a power of two, at least 2.")
        base = 0x9E3779B97F4A7C15
        ids = (tree.tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
        ids ^= ids >> np.uint64(32)
        jumps, up, step = [], tree.parent, 1
        while step < length:
            jumps.append(up)
            ids = np.where(up >= 0, ids + np.uint64(base) * ids[up], ids)
            up = np.where(up >= 0, up[up], -1)
            base = base * base % 2**64
            step *= 2
        return cls(length, ids, jumps)

    def covered(self, ends: np.ndarray, start: int) -> np.ndarray:
        """Bool mask of a slice that begins at `start`: tokens inside a run that ends at a True of `ends`."""
        inside = ends.copy()
        for jump in self.jumps:
            inside[jump[start : start + len(inside)][inside] - start] = True
        return inside
