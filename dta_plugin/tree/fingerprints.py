"""Fingerprints of runs of tokens on the paths of a tree: equal runs have equal ones, others differ but for chance.

A polynomial hash, doubled from one token to two, four and so on. In the layout the ancestors of most tokens are simply
the tokens before them: these go through the layout a block at a time, so that what is on the way stays in the
processor's cache. Where a path jumps back to a fork, the run before the jump is gathered and goes the same way.
Memory: 8 bytes per tree token, 4 more while repeated runs are looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree

_BASE = 0x9E3779B97F4A7C15
_BLOCK = 1 << 15
_MOST_BITS = 22  # of ids, to look up whether they are repeated


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprints:
    """ids: uint64 [T], for every layout token t, of the `length` tokens of its path that end at t, or as many as there
    are. jumps: int64 [J] tokens, in order, whose parent is not the token before them. parent: of the tree.
    """

    length: int
    ids: np.ndarray
    jumps: np.ndarray
    parent: np.ndarray

    @classmethod
    def from_tree(cls, tree: PrefixTree, length: int) -> Fingerprints:
        if length < 2 or length & (length - 1):
            raise InvalidInputError(f"run_length={length}. Expected a power of two, at least 2.")
        starts = tree.node_start[:-1]
        jumps = starts[(tree.parent[starts] != starts - 1) | (starts == 0)]
        ids = of_straight_runs(tree.tokens, length)
        for part in _blocks(len(jumps), max(1, _BLOCK // length)):
            _mend(ids, tree, jumps[part], np.append(jumps, len(ids))[1:][part], length)
        return cls(length, ids, jumps, tree.parent)

    def covered(self, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Bool [stop - start], from token `start` of the layout on: which are in a run that ends at one of `ends`."""
        inside = np.zeros(stop - start, dtype=bool)
        since = ends - self.jumps[np.searchsorted(self.jumps, ends, side="right") - 1]
        inside[ends[since >= self.length - 1] - start] = True
        step = 1
        while step < self.length:
            inside[:-step] |= inside[step:].copy()
            step *= 2
        token = ends[since < self.length - 1]
        for _ in range(self.length):
            inside[token - start] = True
            token = self.parent[token]
        return inside


def of_straight_runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """uint64 [T] of the `length` tokens, or as many as there are, up to each."""
    ids = np.empty(len(tokens), dtype=np.uint64)
    for part in _blocks(len(tokens), _BLOCK):
        first = max(0, part.start - length)
        ids[part] = _of_runs(_of_tokens(tokens[first : part.stop]), length)[part.start - first :]
    return ids


def repeated_ids(ids: np.ndarray, depth: np.ndarray, least: int) -> np.ndarray:
    """The tokens at a depth of at least `least` whose ids [T] occur more than once among these, in order.

    Half of each id tells most of them apart; sorted, equal ones are neighbours. Only what is left is compared in full.
    """
    half, count = np.empty(len(ids), dtype=np.uint32), 0
    for part in _blocks(len(ids), _BLOCK):
        chosen = (ids[part] >> np.uint64(32))[depth[part] >= least]
        half[count : count + len(chosen)] = chosen
        count += len(chosen)
    half = half[:count]
    half.sort()
    bits = min(_MOST_BITS, len(ids).bit_length() + 2)
    is_repeated = np.zeros(1 << bits, dtype=bool)
    for part in _blocks(max(0, count - 1), _BLOCK):
        later = half[part.start + 1 : part.stop + 1]
        is_repeated[later[later == half[part]] >> np.uint32(32 - bits)] = True
    found = [np.zeros(0, dtype=np.int64)]
    for part in _blocks(len(ids), _BLOCK):
        place = (ids[part] >> np.uint64(64 - bits)).view(np.int64)  # what indexes without a copy
        alike = is_repeated[place] & (depth[part] >= least)
        found.append(part.start + np.flatnonzero(alike))
    tokens = np.concatenate(found)
    _, kind, times = np.unique(ids[tokens], return_inverse=True, return_counts=True)
    return tokens[times[kind] > 1]


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _mend(ids: np.ndarray, tree: PrefixTree, jumps: np.ndarray, nexts: np.ndarray, length: int) -> None:
    """Set the ids of the tokens from `jumps` [J] on, up to the next jump, whose runs begin before the jump."""
    above = min(length - 1, int(tree.depth[jumps].max()))
    own = min(length - 1, int((nexts - jumps).max()))
    before = np.empty((len(jumps), above), dtype=np.int64)  # ancestors, the parent last, -1 above a root
    up = tree.parent[jumps]
    for column in range(above - 1, -1, -1):
        before[:, column] = up
        up = np.where(up >= 0, tree.parent[up], -1)
    after = jumps[:, None] + np.arange(own)
    run = np.concatenate([before, np.minimum(after, len(ids) - 1)], axis=1)
    hashes = np.where(run >= 0, _of_tokens(tree.tokens[run]), np.uint64(0))
    is_own = after < nexts[:, None]
    ids[after[is_own]] = _of_runs(hashes, length)[:, above:][is_own]


def _of_runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """uint64 hashes [..., n] of tokens -> in place, of the `length` tokens, or as many as there are, up to each."""
    base, step = _BASE, 1
    while step < length:
        hashes[..., step:] += np.uint64(base) * hashes[..., :-step]
        base = base * base % 2**64
        step *= 2
    return hashes


def _of_tokens(tokens: np.ndarray) -> np.ndarray:
    ids = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ids ^= ids >> np.uint64(32)
    return ids
