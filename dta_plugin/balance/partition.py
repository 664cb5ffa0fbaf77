"""Deal sequences out to bins (ranks, micro-batches) so that the costliest bin costs as little as possible.

A bin computes the prefix tree of its sequences: siblings in one bin share their prefix, siblings in two bins pay for
it twice. So trees stay whole where that balances, and are cut in depth-first order where it pays.

With free sizes: the smallest capacity at which everything fits is found by bisection (MULTIFIT; Coffman, Garey and
Johnson 1978, doi:10.1137/0207001). At each capacity, whole trees go into the fullest bin that takes them, largest
first, and what does not fit is cut to fill the gaps. With given sizes: largest run first into the cheapest bin with
room. Then runs are moved and swapped between the costliest bin and the others while that helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.balance.costs import TYPICAL, Run, SequenceCosts
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence

# Bisection ends where the capacity is known this well.
_PRECISION = 1e-3
# Changes between two bins that are tried in full, of those that look best; sequences up to which single ones move.
_TRIED, _MOST_SINGLES = 8, 2048

Bins = list[list[Run]]


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """bins: per bin the sequence indices, siblings next to each other. loads: predicted cost of each bin.

    lower_bound: no partition has a costliest bin below it. repeated: cost of prefixes that several bins compute.
    """

    bins: list[list[int]]
    loads: list[float]
    lower_bound: float
    repeated: float

    @property
    def imbalance(self) -> float:
        """Largest load over the mean: 1.0 is even."""
        return max(self.loads) * len(self.loads) / sum(self.loads)

    def __str__(self) -> str:
        share = self.repeated / max(sum(self.loads) - self.repeated, 1e-30)
        return (
            f"{sum(map(len, self.bins))} sequences in {len(self.bins)} bins, max/mean load {self.imbalance:.3f}, "
            f"{max(self.loads) / self.lower_bound:.3f} of the lower bound, {share:.1%} of prefixes repeated"
        )


def partition(
    sequences: Sequence[TokenSequence],
    bins: int,
    *,
    model: ModelCost = TYPICAL,
    first_scored: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> Partition:
    """Deal `sequences` out to `bins` bins.

    model: what a token, a pair and a scored token cost; see `execution.model.model_cost`. first_scored: per sequence,
        where its completion begins (only scored tokens pay for the LM head). sizes: sequences per bin, for frameworks
        that need equal counts; None: whatever balances, and bins stay empty where using them would lower nothing.

    Raises InvalidInputError for no sequences, fewer than one bin, and sizes or first_scored that do not fit.
    """
    if not len(sequences):
        raise InvalidInputError(
            "Got no sequences to deal out. Expected at least one; skip the call for an empty batch."
        )
    if bins < 1:
        raise InvalidInputError(f"Got bins={bins}. Expected at least 1.")
    if sizes is not None and (len(sizes) != bins or sum(sizes) != len(sequences) or min(sizes) < 0):
        raise InvalidInputError(
            f"Got sizes={list(sizes)} for {len(sequences)} sequences in {bins} bins. Expected {bins} counts, none "
            f"negative, that add up to {len(sequences)}."
        )
    costs = SequenceCosts.of(sequences, model, first_scored)
    own = costs.without_trunk()
    filled = _free(own, bins) if sizes is None else _sized(own, list(sizes))
    filled = _improved(own, filled, swaps_only=sizes is not None)
    loads = [costs.of_runs(runs) for runs in filled]
    members = [
        [
            int(costs.order[rank])
            for run in sorted(runs, key=lambda run: run.start)
            for rank in range(run.start, run.stop)
        ]
        for runs in filled
    ]
    lower_bound = costs.trunk + _least_capacity(own, bins)
    return Partition(members, loads, lower_bound, sum(loads) - costs.total)


def _least_capacity(costs: SequenceCosts, bins: int) -> float:
    return max(costs.total / bins, float(costs.path.max()))


def _free(costs: SequenceCosts, bins: int) -> Bins:
    low = _least_capacity(costs, bins)
    high, best = low, _packed(costs, bins, low)
    while best is None:
        low, high = high, 2 * high
        best = _packed(costs, bins, high)
    while high > low * (1 + _PRECISION):
        middle = (low + high) / 2
        found = _packed(costs, bins, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _packed(costs: SequenceCosts, bins: int, capacity: float) -> Bins | None:
    """Everything within `capacity` per bin, or None if this way of packing does not manage."""
    filled: Bins = [[] for _ in range(bins)]
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


def _sized(costs: SequenceCosts, sizes: list[int]) -> Bins:
    filled: Bins = [[] for _ in sizes]
    room, loads = np.array(sizes), np.zeros(len(sizes))
    largest = max(sizes)
    runs = [
        Run(start, min(start + largest, tree.stop))
        for tree in costs.trees
        for start in range(tree.start, tree.stop, largest)
    ]
    waiting = sorted(runs, key=costs.of_run)
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
        room[into] -= len(run)
        loads[into] = costs.of_runs(filled[into])
    return filled


def _improved(costs: SequenceCosts, bins: Bins, swaps_only: bool) -> Bins:
    """Move or swap whole runs, then single sequences, while that relieves the costliest bin."""
    bins = _relieved(costs, bins, swaps_only)
    if len(costs) > _MOST_SINGLES:
        return bins
    singles = [[Run(rank, rank + 1) for run in runs for rank in range(run.start, run.stop)] for runs in bins]
    return _relieved(costs, singles, swaps_only)


def _relieved(costs: SequenceCosts, bins: Bins, swaps_only: bool) -> Bins:
    """Change after change, the best one first, between the costliest bin and any other."""
    bins = [list(runs) for runs in bins]
    loads = [costs.of_runs(runs) for runs in bins]
    while True:
        top = int(np.argmax(loads))
        best, change = loads[top] * (1 - _PRECISION), None
        for other in sorted(range(len(bins)), key=loads.__getitem__):
            if loads[other] >= best:
                break
            for here, there in _exchanges(costs, bins[top], bins[other], loads[top], loads[other], swaps_only):
                worst = max(costs.of_runs(here), costs.of_runs(there))
                if worst < best:
                    best, change = worst, (other, here, there)
        if change is None:
            return bins
        other, bins[top], bins[other] = change
        loads[top], loads[other] = costs.of_runs(bins[top]), costs.of_runs(bins[other])


def _exchanges(
    costs: SequenceCosts, here: list[Run], there: list[Run], load: float, other: float, swaps_only: bool
) -> Iterator[tuple[list[Run], list[Run]]]:
    """Both bins after the most promising changes, by what the runs cost apart from what the bins share."""
    given = np.array([costs.of_run(run) for run in here])
    taken = np.array([costs.of_run(run) for run in there] + [0.0])  # the last one: nothing in return
    moved = given[:, None] - taken[None, :]
    worst = np.maximum(load - moved, other + moved)
    if swaps_only:
        sizes = np.array([len(run) for run in there] + [0])
        worst[np.array([len(run) for run in here])[:, None] != sizes[None, :]] = np.inf
    elif len(here) == 1:
        worst[:, -1] = np.inf  # no bin is left empty
    for place in np.argsort(worst, axis=None)[:_TRIED]:
        i, j = divmod(int(place), worst.shape[1])
        if worst[i, j] < load:
            returned = [there[j]] if j < len(there) else []
            yield here[:i] + here[i + 1 :] + returned, [run for run in there if run not in returned] + [here[i]]
