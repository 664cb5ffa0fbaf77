"""Ways to deal sequences out to bins, and what the bins cost. All return sequence indices per bin.

ours            dta_plugin.balance.partition
equal counts    the same, with as many sequences in every bin, where the bins divide their number
contiguous      AReaL-DTA's: cut depth-first order into pieces of at most so many tree tokens, the threshold found by
                bisection. As there, only a leaf of the tree ends a piece: a sequence that another one continues goes
                with it.
longest first   longest sequence first, to the bin with the fewest tokens, whatever is shared: balancers of flat tokens
random          shuffled, equal counts; five seeds, of which the table shows the mean
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from dta_plugin.balance import partition
from dta_plugin.balance.costs import TOKENS, SequenceCosts

SEEDS = 5
# The bisection of AReaL-DTA ends here, relative to the larger threshold.
_PRECISION = 1e-4

Rows = Sequence[np.ndarray]
Bins = list[list[int]]


def contenders(rows: Rows, bins: int) -> dict[str, Callable[[], Bins]]:
    """Those that can deal `rows` out to `bins` bins."""
    found: dict[str, Callable[[], Bins]] = {"ours": lambda: partition(rows, bins, allow_empty=len(rows) < bins).bins}
    if len(rows) % bins == 0:
        found["equal counts"] = lambda: partition(rows, bins, sizes="equal").bins
    found["contiguous"] = lambda: contiguous(rows, bins)
    found["longest first"] = lambda: longest_first(rows, bins)
    return found | {f"random {seed}": partial(shuffled, rows, bins, seed) for seed in range(SEEDS)}


def contiguous(rows: Rows, bins: int) -> Bins:
    costs = SequenceCosts.from_sequences(rows, TOKENS)
    before = np.concatenate([[0.0], np.cumsum(costs.path - costs.shared)])
    is_leaf = np.append(costs.shared[1:] < costs.path[:-1], True)
    ends = np.concatenate([[0], np.flatnonzero(is_leaf) + 1])

    def cut(most: float) -> list[int] | None:
        """Where pieces of at most `most` tree tokens begin and end; None if there are more than `bins`."""
        cuts = [0]
        while cuts[-1] < len(rows) and len(cuts) <= bins:
            start = cuts[-1]
            budget = most + before[start] - costs.shared[start]
            stop = int(ends[np.searchsorted(before[ends], budget, side="right") - 1])
            if stop <= start:
                return None
            cuts.append(stop)
        return cuts if cuts[-1] == len(rows) else None

    high = float(before[-1])
    low, best = high / bins, [0, len(rows)]
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if found := cut(middle):
            high, best = middle, found
        else:
            low = middle
    best += [len(rows)] * (bins + 1 - len(best))
    return [costs.order[a:b].tolist() for a, b in pairwise(best)]


def longest_first(rows: Rows, bins: int) -> Bins:
    filled: Bins = [[] for _ in range(bins)]
    emptiest = [(0, index) for index in range(bins)]
    for row in sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True):
        tokens, index = emptiest[0]
        filled[index].append(row)
        heapq.heapreplace(emptiest, (tokens + len(rows[row]), index))
    return filled


def shuffled(rows: Rows, bins: int, seed: int) -> Bins:
    order = np.random.default_rng(seed).permutation(len(rows))
    return [part.tolist() for part in np.array_split(order, bins)]
