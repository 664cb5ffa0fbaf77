"""Ways to deal sequences out at one go; `search` improves on them.

Depth-first order cut by count. Largest tree first into the cheapest bin with room (LPT; Graham 1969,
doi:10.1137/0117039). With free sizes also the smallest capacity, found by bisection (MULTIFIT; Coffman, Garey and
Johnson 1978, doi:10.1137/0207001), within which whole trees go first and others are cut to fill the gaps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dta_plugin.balance.bound import lower_bound
from dta_plugin.balance.costs import Run, SequenceCosts

# Bisection ends where the capacity is known this well.
_PRECISION = 1e-3

BinRuns = list[list[Run]]  # per bin
Assignment = list[np.ndarray]  # per bin int64 [R], ascending


def free_starts(costs: SequenceCosts, bins: int) -> list[Assignment]:
    """Several ways, all with any number of sequences per bin."""
    any_count = [len(costs)] * bins
    in_order = np.array_split(np.arange(len(costs)), bins)
    return [places_of(_least_capacity(costs, bins)), places_of(_largest_first(costs, any_count)), in_order]


def sized_starts(costs: SequenceCosts, sizes: Sequence[int]) -> list[Assignment]:
    """Several ways, all with `sizes` sequences in the bins."""
    smallest_first = np.argsort(sizes, kind="stable")
    orders = (smallest_first, smallest_first[::-1]) if min(sizes) < max(sizes) else (smallest_first,)
    return [places_of(_largest_first(costs, sizes)), *(_in_order(costs, sizes, order) for order in orders)]


def whole_starts(costs: SequenceCosts, sizes: Sequence[int]) -> list[Assignment]:
    """With `sizes` sequences in the bins and as few trees cut as any way here needs."""
    trees = costs.trees
    exact = [
        [Run(trees[tree].start + a, trees[tree].start + b) for tree, a, b in parts]
        for parts in filled_in_order([len(tree) for tree in trees], sizes)
    ]
    ways = [_largest_first(costs, sizes), _largest_first(costs, sizes, by_count=True), exact]
    pieces = [sum(map(len, filled)) for filled in ways]
    return [places_of(filled) for filled, count in zip(ways, pieces, strict=True) if count == min(pieces)]


def filled_in_order(counts: Sequence[int], sizes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Items of `counts` parts each, dealt out to bins of `sizes` parts: per bin (item, first part, end of parts).

    A bin takes the first items that fill it exactly. Where none do, it takes the first that fill it best, and the part
    that is missing of the next one.
    """
    waiting = [(item, 0, count) for item, count in enumerate(counts)]
    bins = []
    for size in sizes:
        chosen = _first_that_fill([b - a for _, a, b in waiting], size)
        filled = [waiting[place] for place in chosen]
        waiting = [part for place, part in enumerate(waiting) if place not in set(chosen)]
        missing = size - sum(b - a for _, a, b in filled)
        if missing:
            item, a, b = waiting[0]
            filled.append((item, a, a + missing))
            waiting[0] = (item, a + missing, b)
        bins.append(filled)
    return bins


def _first_that_fill(counts: Sequence[int], size: int) -> list[int]:
    """Places whose counts add up to `size`, or to as much below it as possible; as early ones as there are."""
    within = (1 << size + 1) - 1
    sums = [1]  # bit s: the last counts, one more with every entry, can add up to s
    for count in reversed(counts):
        sums.append((sums[-1] | sums[-1] << count) & within)
    rest = sums.pop().bit_length() - 1
    chosen = []
    for place, count in enumerate(counts):
        if rest >= count and sums[-1 - place] >> (rest - count) & 1:
            chosen.append(place)
            rest -= count
    return chosen


def _least_capacity(costs: SequenceCosts, bins: int) -> BinRuns:
    """What `packed` does at the smallest capacity that suffices it."""
    low = high = lower_bound(costs, bins)
    best = packed(costs, bins, low)
    while best is None:
        low, high = high, 2 * high
        best = packed(costs, bins, high)
    while high > low * (1 + _PRECISION):
        middle = (low + high) / 2
        found = packed(costs, bins, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def packed(costs: SequenceCosts, bins: int, capacity: float) -> BinRuns | None:
    """Everything within `capacity` per bin, or None if this way of packing does not manage."""
    filled: BinRuns = [[] for _ in range(bins)]
    room = np.full(bins, capacity)

    def put(run: Run, into: int) -> None:
        filled[into].append(run)
        room[into] -= costs.of_run(run)

    left = []
    for run in sorted(costs.trees, key=costs.of_run, reverse=True):
        fitting = np.where(room >= costs.of_run(run), room, np.inf)
        tightest = int(fitting.argmin())
        if np.isfinite(fitting[tightest]):
            put(run, tightest)
        else:
            left.append(run)
    for run in left:
        while len(run):
            widest = int(room.argmax())
            part = costs.longest_within(run, float(room[widest]))
            if not len(part):
                return None
            put(part, widest)
            run = Run(part.stop, run.stop)
    return filled


def _in_order(costs: SequenceCosts, sizes: Sequence[int], order: np.ndarray) -> Assignment:
    """Depth-first order cut into `sizes`, for the bins in `order`."""
    parts = np.split(np.arange(len(costs)), np.asarray(sizes)[order].cumsum()[:-1])
    return [parts[place] for place in order.argsort()]


def _largest_first(costs: SequenceCosts, sizes: Sequence[int], by_count: bool = False) -> BinRuns:
    """The costliest tree first, or the one of most sequences, into the cheapest bin with room."""
    filled: BinRuns = [[] for _ in sizes]
    room, loads = np.array(sizes), np.zeros(len(sizes))
    largest = max(sizes)
    cuts = [(start, tree.stop) for tree in costs.trees for start in range(tree.start, tree.stop, largest)]
    waiting = sorted((Run(start, min(start + largest, stop)) for start, stop in cuts), key=costs.of_run)
    if by_count:
        waiting.sort(key=len)
    while waiting:
        run = waiting.pop()
        takes = room >= len(run)
        if takes.any():
            into = int(np.lexsort((room, np.where(takes, loads, np.inf)))[0])  # of equal ones, where it fits tightest
        else:  # cut it to fill the bin with most room; the rest waits
            into = int(room.argmax())
            waiting.append(Run(run.start + int(room[into]), run.stop))
            run = Run(run.start, run.start + int(room[into]))
        filled[into].append(run)
        loads[into] += costs.of_run(run)
        room[into] -= len(run)
    return filled


def places_of(bins: BinRuns) -> Assignment:
    none = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([none, *(np.arange(run.start, run.stop) for run in runs)])) for runs in bins]


def without_empty(costs: SequenceCosts, filled: Assignment) -> Assignment:
    """As many bins, none of them empty: others are cut where that repeats least. Needs as many sequences as bins."""
    whole = [places for places in filled if len(places)]
    before = [np.append(np.inf, costs.overlap(places[:-1] + 1, places[1:])) for places in whole]
    repeated = np.concatenate(before)  # by a cut before each sequence; inf where a bin begins
    cuts = repeated.argsort(kind="stable")[: len(filled) - len(whole)]
    starts = np.concatenate([np.flatnonzero(np.isinf(repeated)), cuts])
    return np.split(np.concatenate(whole), np.sort(starts)[1:])
