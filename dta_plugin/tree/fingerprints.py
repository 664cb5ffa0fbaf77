"""Fingerprints of runs of tokens on the paths of a tree: equal runs have equal ones, others differ but for chance.

A polynomial hash, doubled from one token to two, four and so on by looking up what ends at the ancestor. In a large
layout with few forks the ancestor of most tokens is simply so many tokens before: these are doubled a block at a time,
so that what is on the way stays in the processor's cache, and the runs behind a fork are summed up along their paths.
Memory: 9 bytes per tree token there, 8 * (1 + log2(length)) else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree

_BASE = 0x9E3779B97F4A7C15
_BLOCK = 1 << 15
_LARGE = 1 << 18  # tokens of a tree, from which on it matters how they are gone through
_FEW = 1 / 16  # share of tokens behind a fork
_MOST_BITS = 22  # of ids, to look up whether they are repeated


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """ids: uint64 [T], for every layout token t, of the `length` tokens of its path that end at t.

    jumps: for 1, 2, 4.. below `length`, the ancestor that many tokens up, -1 above a root. Without them, is_bent: bool
    [T], whether some ancestor within `length` tokens is not simply so many tokens before; then parent leads up.
    """

    length: int
    ids: np.ndarray
    jumps: list[np.ndarray]
    is_bent: np.ndarray
    parent: np.ndarray

    @classmethod
    def from_tree(cls, tree: PrefixTree, length: int) -> Fingerprints:
        if length < 2 or length & (length - 1):
            raise InvalidInputError(f"run_length={length}. Expected a power of two, at least 2.")
        is_bent = np.zeros(0, dtype=bool)
        if tree.tree_tokens >= _LARGE:
            is_bent = np.ones(tree.tree_tokens, dtype=bool)
            is_bent[1:] = tree.parent[1:] != np.arange(tree.tree_tokens - 1)
            _spread(is_bent, length, forward=True)
            bent = np.flatnonzero(is_bent)
            if len(bent) <= _FEW * tree.tree_tokens:
                ids = of_straight_runs(tree.tokens, length)
                ids[bent] = _of_paths(tree, bent, length)
                return cls(length, ids, [], is_bent, tree.parent)
        ids, jumps = _doubled(tree, length)
        return cls(length, ids, jumps, is_bent, tree.parent)

    def covered(self, ends: np.ndarray, start: int) -> np.ndarray:
        """Bool mask of a slice that begins at `start`: tokens inside a run that ends at a True of `ends`."""
        if self.jumps:
            inside = ends.copy()
            for jump in self.jumps:
                inside[jump[start : start + len(inside)][inside] - start] = True
            return inside
        is_bent = self.is_bent[start : start + len(ends)]
        inside = ends & ~is_bent
        _spread(inside, self.length, forward=False)
        token = start + np.flatnonzero(ends & is_bent)
        for _ in range(self.length):
            inside[token - start] = True
            token = self.parent[token]
        return inside


def of_straight_runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """uint64 [T] of the `length` tokens of the layout, or as many as there are, up to each."""
    ids = np.empty(len(tokens), dtype=np.uint64)
    for start in range(0, len(tokens), _BLOCK):
        first = max(0, start - length)
        block = _of_tokens(tokens[first : start + _BLOCK])
        base, step = _BASE, 1
        while step < length:
            block[step:] += np.uint64(base) * block[:-step]
            base = base * base % 2**64
            step *= 2
        ids[start : start + _BLOCK] = block[start - first :]
    return ids


def repeated_ids(ids: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Where `whole` is set, the tokens whose ids occur more than once, and few others.

    Half of each id tells most of them apart; sorted, equal ones are neighbours. Only what is left is compared in full.
    """
    half = (ids >> np.uint64(32)).astype(np.uint32)[whole]
    half.sort()
    bits = min(_MOST_BITS, len(ids).bit_length() + 2)
    is_repeated = np.zeros(1 << bits, dtype=bool)
    is_repeated[half[1:][half[1:] == half[:-1]] >> np.uint32(32 - bits)] = True
    return np.flatnonzero(is_repeated[ids >> np.uint64(64 - bits)] & whole)


def _doubled(tree: PrefixTree, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """ids and jumps of any tree."""
    ids = _of_tokens(tree.tokens)
    base, jumps, up, step = _BASE, [], tree.parent, 1
    while step < length:
        jumps.append(up)
        ids = np.where(up >= 0, ids + np.uint64(base) * ids[up], ids)
        up = np.where(up >= 0, up[up], -1)
        base = base * base % 2**64
        step *= 2
    return ids, jumps


def _spread(flags: np.ndarray, length: int, forward: bool) -> None:
    """Set, in place, the flags within `length` tokens from those that are set; `length` is a power of two."""
    step = 1
    while step < length:
        ahead, behind = flags[step:], flags[:-step]
        if forward:
            ahead |= behind.copy()
        else:
            behind |= ahead.copy()
        step *= 2


def _of_paths(tree: PrefixTree, ends: np.ndarray, length: int) -> np.ndarray:
    """uint64 of the `length` tokens of their paths, or as many as there are, up to `ends`."""
    ids = _of_tokens(tree.tokens[ends])
    up, weight, rest = ends, 1, np.arange(len(ends))
    for _ in range(length - 1):
        up = tree.parent[up]
        rest, up = rest[up >= 0], up[up >= 0]
        weight = weight * _BASE % 2**64
        ids[rest] += np.uint64(weight) * _of_tokens(tree.tokens[up])
    return ids


def _of_tokens(tokens: np.ndarray) -> np.ndarray:
    ids = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ids ^= ids >> np.uint64(32)
    return ids
