"""Local search: sequences and subtrees move between the costliest bin and the others while that relieves it.

A bin's sequences, in depth-first order, form a tree of their own. What it costs less without one of its subtrees, and
what another bin costs more with it, are differences of prefix sums and a few overlaps: all pairs of subtrees of two
bins are weighed at once, and the best looking exchanges computed in full.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dta_plugin.balance.costs import SequenceCosts
from dta_plugin.balance.starts import Ranks

# A change has to lower the costlier of two bins by this share of it.
_PRECISION = 1e-3
# Exchanges between two bins that are computed in full; subtrees of a bin that are considered.
_TRIED, _MOST = 8, 512


class Bin:
    """A bin and what it could give away. C = its sequences and its subtrees of several.

    ranks: int64 [R], ascending. starts, stops: int64 [C], places in `ranks`. saved: [C] what it costs less without.
    alone: [C] what they cost by themselves.
    """

    def __init__(self, costs: SequenceCosts, ranks: np.ndarray) -> None:
        self.costs, self.ranks, self.load = costs, ranks, costs.of_ranks(ranks)
        overlap = costs.overlap(ranks[:-1] + 1, ranks[1:])
        beside = np.concatenate([[0.0], overlap, [0.0]])[: len(ranks) + 1]  # [R + 1] before each place
        before = np.concatenate([[0.0], np.cumsum(costs.path[ranks] - beside[:-1])])
        self.starts, self.stops = np.array(sorted(_subtrees(overlap.tolist(), len(ranks))), dtype=np.int64).reshape(-1, 2).T
        self.alone = before[self.stops] - before[self.starts] + beside[self.starts]
        inside = (self.starts > 0) & (self.stops < len(ranks))
        closed = np.zeros(len(self.starts))
        a, b = self.starts[inside], self.stops[inside]
        closed[inside] = costs.overlap(ranks[a - 1] + 1, ranks[b])
        self.saved = self.alone - beside[self.starts] - beside[self.stops] + closed
        if len(self.saved) > _MOST:  # of all sizes
            chosen = self.saved.argsort()[np.linspace(0, len(self.saved) - 1, _MOST).astype(np.int64)]
            self.starts, self.stops, self.alone, self.saved = (
                values[chosen] for values in (self.starts, self.stops, self.alone, self.saved)
            )

    def added(self, to: Bin) -> np.ndarray:
        """[C] what `to` costs more with each of them; too much where its own sequences stand between theirs."""
        firsts, lasts = self.ranks[self.starts], self.ranks[self.stops - 1]
        left, right = np.searchsorted(to.ranks, firsts), np.searchsorted(to.ranks, lasts)
        has_left, has_right = left > 0, right < len(to.ranks)
        shared = np.zeros((2, len(firsts)))
        shared[0, has_left] = self.costs.overlap(to.ranks[left[has_left] - 1] + 1, firsts[has_left])
        shared[1, has_right] = self.costs.overlap(lasts[has_right] + 1, to.ranks[right[has_right]])
        return self.alone - shared.max(axis=0)


def relieved(costs: SequenceCosts, bins: Ranks, swaps_only: bool) -> Ranks:
    """The bins after changes to the costliest one, until none helps. swaps_only: counts stay. No bin is left empty."""
    filled = [Bin(costs, ranks) for ranks in bins]
    while True:
        top = max(range(len(filled)), key=lambda index: filled[index].load)
        best = filled[top].load * (1 - _PRECISION)
        change = None
        for other in sorted(range(len(filled)), key=lambda index: filled[index].load):
            if filled[other].load >= best:
                break
            for here, there in _exchanges(filled[top], filled[other], best, swaps_only):
                worst = max(costs.of_ranks(here), costs.of_ranks(there))
                if worst < best:
                    best, change = worst, (other, here, there)
            if change is not None:
                break
        if change is None:
            return [one.ranks for one in filled]
        other, here, there = change
        filled[top], filled[other] = Bin(costs, here), Bin(costs, there)


def _exchanges(here: Bin, there: Bin, best: float, swaps_only: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both bins' ranks after the most promising changes, by what they would cost if the two exchanged were strangers."""
    after_here = (here.load - here.saved)[:, None] + np.append(there.added(here), 0.0)  # the last: nothing in return
    after_there = (there.load + here.added(there))[:, None] - np.append(there.saved, 0.0)
    worst = np.maximum(after_here, after_there)
    if swaps_only:
        worst[(here.stops - here.starts)[:, None] != np.append(there.stops - there.starts, 0)] = np.inf
    else:
        worst[here.stops - here.starts == len(here.ranks), -1] = np.inf
    flat = worst.ravel()
    tried = np.argpartition(flat, _TRIED)[:_TRIED] if len(flat) > _TRIED else np.arange(len(flat))
    for place in tried[flat[tried] < best].tolist():
        i, j = divmod(place, worst.shape[1])
        given, kept = _parted(here, i)
        returned, left = _parted(there, j) if j < len(there.saved) else (there.ranks[:0], there.ranks)
        yield np.sort(np.concatenate([kept, returned])), np.sort(np.concatenate([left, given]))


def _parted(one: Bin, index: int) -> tuple[np.ndarray, np.ndarray]:
    start, stop = one.starts[index], one.stops[index]
    return one.ranks[start:stop], np.concatenate([one.ranks[:start], one.ranks[stop:]])


def _subtrees(overlap: list[float], count: int) -> set[tuple[int, int]]:
    """Neighbours [start, stop) that share more with each other than with those around them, and every one alone."""
    found = {(place, place + 1) for place in range(count)}
    if not overlap:
        return found
    opened: list[tuple[float, int]] = []  # overlap within, first place
    for place, shared in enumerate([*overlap, -1.0]):
        start = place
        while opened and opened[-1][0] > shared:
            start = opened.pop()[1]
            found.add((start, place + 1))
        if not opened or opened[-1][0] < shared:
            opened.append((shared, start))
    return found
