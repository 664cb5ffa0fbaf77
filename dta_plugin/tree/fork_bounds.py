"""Which of many groups may hold the most expensive forks, from counts and fingerprints; no tree is made.

A fork has at most as many tokens apart as its group's tree has behind the first fork, and repeated ones only where runs
of tokens occur again. Most groups of a large file so need no tree to be passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from dta_plugin.tree.counts import TokenRows, TreeCounts
from dta_plugin.tree.fingerprints import of_straight_runs, repeated_ids

_BLOCK = 1 << 20  # tokens whose fingerprints are compared at once, or a group
_ODD = np.uint64(0xC2B2AE3D27D4EB4F)


def fork_bounds(rows: TokenRows, counts: TreeCounts, run_length: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [G], int64 [G]: no fork of a group has more tokens repeated, or apart; -1 where nothing forks.

    run_length: tokens in a row that count as a repetition, as in `rank_forks`.
    """
    first, sequences = counts.first_forks(), counts.sequences
    apart = np.where(first < 0, -1, _apart(counts, first))
    repeated = np.zeros(len(first), dtype=np.int64)
    group = np.repeat(np.arange(len(first)), sequences)
    whole = np.maximum(counts.lcp, first[group] + run_length - 1)  # from here on, a run lies behind the first fork
    own = np.flatnonzero((whole < counts.lengths) & (first[group] >= 0))
    group, begins = group[own], rows.begins[counts.order[own]] + whole[own] - (run_length - 1)
    lengths = (counts.lengths - whole)[own] + run_length - 1
    for start, stop in _blocks(group, lengths):
        part = slice(start, stop)
        repeated += _in_repeats(rows.flat, begins[part], lengths[part], group[part], run_length, len(first))
    return np.minimum(repeated, apart), apart


def _apart(counts: TreeCounts, first: np.ndarray) -> np.ndarray:
    """int64 [G]: of the first fork exactly, of others at most what is behind its branches without an even share."""
    group = np.repeat(np.arange(len(first)), counts.sequences)
    begins = counts.lcp <= first[group]  # a branch of the first fork
    starts = np.cumsum(counts.sequences) - counts.sequences
    begins[starts] = True
    branches = np.flatnonzero(begins)
    behind = np.maximum(counts.lengths - np.maximum(counts.lcp, first[group]), 0)  # some end above the fork
    size = np.add.reduceat(behind, branches)
    sequences = np.diff(np.append(branches, len(group)))
    of_group = np.searchsorted(branches, starts)
    of_first = np.add.reduceat(size, of_group) - np.maximum.reduceat(size, of_group)
    return np.maximum(of_first, np.maximum.reduceat(size * (sequences - 1) // sequences, of_group))


def _blocks(group: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices of whole groups, of about so many tokens."""
    if not len(group):
        return
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    block = (np.cumsum(lengths) // _BLOCK)[starts]
    cuts = starts[np.flatnonzero(np.diff(block, prepend=-1))]
    yield from pairwise([*cuts.tolist(), len(group)])


def _in_repeats(
    flat: np.ndarray, begins: np.ndarray, lengths: np.ndarray, group: np.ndarray, run_length: int, groups: int
) -> np.ndarray:
    """int64 [groups]: how many tokens of the stretches begins [K], lengths [K] of `flat` are in runs that their group
    has twice."""
    offsets = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
    ids = of_straight_runs(flat[place + np.repeat(begins, lengths)], run_length)
    ids ^= np.repeat(group.astype(np.uint64) * _ODD, lengths)
    tokens = repeated_ids(ids, place, run_length - 1)
    stretch = np.searchsorted(offsets, tokens, side="right") - 1
    new = np.minimum(np.diff(tokens, prepend=-run_length), run_length)
    new[np.diff(stretch, prepend=-1) > 0] = run_length
    return np.bincount(group[stretch], weights=new, minlength=groups).astype(np.int64)
