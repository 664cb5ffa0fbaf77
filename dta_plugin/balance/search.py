"""Local search: sequences and subtrees move between the costliest bin and the others while that relieves it.

A bin's sequences, in depth-first order, form a tree of their own. What it costs less without one of its subtrees, and
what another bin costs more with it, are differences of prefix sums and a few overlaps: all pairs of subtrees of two
bins are weighed at once, and the best looking exchanges computed in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dta_plugin.balance.costs import SequenceCosts, subtrees
from dta_plugin.balance.starts import Assignment

# A change has to lower the costlier of two bins by this share of it.
_PRECISION = 1e-3
# Exchanges between two bins that are computed in full; subtrees of a bin, and other bins, that are considered.
_TRIED, _MOST, _OTHERS = 8, 512, 128


class Bin:
    """A bin and what it could give away. C = its sequences and its subtrees of several, or a choice of them.

    places: int64 [R], ascending. load: its cost. starts, stops: int64 [C], indices into `places`. alone: float64 [C]
    what they cost by themselves. saved: float64 [C] what the bin costs less without. whole: it gives nothing away that
    shares with what it keeps.
    """

    def __init__(self, costs: SequenceCosts, places: np.ndarray, whole: bool = False) -> None:
        self.costs, self.places, self.load, self.whole = costs, places, costs.of_places(places), whole
        inner = costs.overlap(places[:-1] + 1, places[1:])
        beside = np.concatenate([[0.0], inner, [0.0]])[: len(places) + 1]  # [R + 1] what two neighbours share
        before = np.concatenate([[0.0], np.cumsum(costs.path[places] - beside[:-1])])
        a, b = np.array(sorted(subtrees(inner.tolist(), len(places))), dtype=np.int64).reshape(-1, 2).T
        if whole:
            apart = (beside[a] == 0) & (beside[b] == 0)
            a, b = a[apart], b[apart]
        alone = before[b] - before[a] + beside[a]
        between = (a > 0) & (b < len(places))
        meeting = np.zeros(len(a))  # what the neighbours of a subtree share without it
        meeting[between] = costs.overlap(places[a[between] - 1] + 1, places[b[between]])
        saved = alone - beside[a] - beside[b] + meeting
        some = saved.argsort()[np.linspace(0, len(a) - 1, min(_MOST, len(a))).astype(np.int64)]  # of all sizes
        self.starts, self.stops, self.alone, self.saved = a[some], b[some], alone[some], saved[some]

    @property
    def sizes(self) -> np.ndarray:
        return self.stops - self.starts

    def added_to(self, other: Bin) -> np.ndarray:
        """[C] what `other` would cost more with each; too much where sequences of `other` belong between theirs."""
        firsts, lasts = self.places[self.starts], self.places[self.stops - 1]
        right = np.searchsorted(other.places, lasts)
        left = np.searchsorted(other.places, firsts) - 1
        has_left, has_right = left >= 0, right < len(other.places)
        has_both = has_left & has_right
        added = self.alone.copy()
        added[has_left] -= self.costs.overlap(other.places[left[has_left]] + 1, firsts[has_left])
        added[has_right] -= self.costs.overlap(lasts[has_right] + 1, other.places[right[has_right]])
        added[has_both] += self.costs.overlap(other.places[left[has_both]] + 1, other.places[right[has_both]])
        return added

    def parted(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of one of the C, and the bin's others."""
        start, stop = self.starts[index], self.stops[index]
        return self.places[start:stop], np.delete(self.places, slice(start, stop))

    def holding(self, places: np.ndarray) -> Bin:
        return Bin(self.costs, places, self.whole)


Bins = list[Bin]


def local_search(
    costs: SequenceCosts, starts: Sequence[Assignment], swaps_only: bool, whole: bool = False
) -> Assignment:
    """The best of what local search makes of `starts`. swaps_only: bins keep their counts. whole: no tree is cut anew.

    No bin is left empty that was not.
    """
    found = [_descended([Bin(costs, places, whole) for places in start], swaps_only) for start in starts]
    return [one.places for one in min(found, key=_objective)]


def _objective(bins: Bins) -> tuple[float, float]:
    """To be minimised: the costliest bin; then what all cost."""
    loads = [one.load for one in bins]
    return max(loads), sum(loads)


def _descended(bins: Bins, swaps_only: bool) -> Bins:
    """After changes to the costliest bin, until none with a cheap one helps."""
    bins = list(bins)
    while True:
        by_load = sorted(range(len(bins)), key=lambda index: bins[index].load)
        top = by_load[-1]
        for other in by_load[:-1][:_OTHERS]:
            if changed := _best_exchange(bins[top], bins[other], swaps_only):
                bins[top], bins[other] = changed
                break
        else:
            return bins


def _best_exchange(here: Bin, there: Bin, swaps_only: bool) -> tuple[Bin, Bin] | None:
    """Both after the best change, if it lowers the first, costlier one."""
    best, change = here.load * (1 - _PRECISION), None
    if there.load >= best:
        return None
    for pair in _exchanges(here, there, best, swaps_only):
        worst = max(map(here.costs.of_places, pair))
        if worst < best:
            best, change = worst, pair
    return change and (here.holding(change[0]), there.holding(change[1]))


def _exchanges(here: Bin, there: Bin, best: float, swaps_only: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both bins' places after the most promising changes: what they would cost if those exchanged shared nothing."""
    after_here = (here.load - here.saved)[:, None] + np.append(there.added_to(here), 0.0)  # last: nothing in return
    after_there = (there.load + here.added_to(there))[:, None] - np.append(there.saved, 0.0)
    worst = np.maximum(after_here, after_there)
    if swaps_only:
        worst[here.sizes[:, None] != np.append(there.sizes, 0)] = np.inf
    else:
        worst[here.sizes == len(here.places), -1] = np.inf
    flat = worst.ravel()
    tried = np.argpartition(flat, _TRIED)[:_TRIED] if len(flat) > _TRIED else np.arange(len(flat))
    for place in tried[flat[tried] < best].tolist():
        given, returned = divmod(place, worst.shape[1])
        yield _exchanged(here, there, given, returned if returned < len(there.sizes) else None)


def _exchanged(here: Bin, there: Bin, given: int, returned: int | None) -> tuple[np.ndarray, np.ndarray]:
    gift, kept = here.parted(given)
    back, left = (there.places[:0], there.places) if returned is None else there.parted(returned)
    return np.sort(np.concatenate([kept, back])), np.sort(np.concatenate([left, gift]))
