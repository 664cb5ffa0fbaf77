"""Which rows of a rank form a micro-batch: siblings together, within a budget of tree tokens, or by numbers of rows.

Micro-batches run one after another, so the sum of their costs is the time, and the largest one the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from dta_plugin.balance import pack, partition
from dta_plugin.balance.costs import SequenceCosts, loads
from dta_plugin.training.placement.ranks import Bins, improves
from dta_plugin.tree.cost import ModelCost


def to_micro_batches(
    sequences: Sequence[np.ndarray], first_scored: Sequence[int], sizes: Sequence[int], cost: ModelCost
) -> Bins:
    """Per micro-batch its rows, `sizes` of them.

    The depth-first order cut into `sizes` rarely tears a group; the balanced partition is taken where its sum is lower,
    or where the sum is as low and its largest micro-batch smaller.
    """
    costs = SequenceCosts.from_sequences(sequences, cost, first_scored)
    cut = [costs.order[a:b].tolist() for a, b in pairwise([0, *accumulate(sizes)])]
    dealt = partition(sequences, len(sizes), cost=cost, first_scored=first_scored, sizes=sizes).bins
    return dealt if improves(loads(costs, dealt), loads(costs, cut), sum, max) else cut


class BudgetPlanner:
    """Micro-batches of at most `budget` tree tokens: groups stay whole, and one that is larger is cut along its tree.

    count: how many they are, of which there may be more on other ranks.
    """

    def __init__(self, sequences: Sequence[np.ndarray], budget: int) -> None:
        self.sequences, self.budget = sequences, budget
        self.count = len(pack(sequences, budget).bins)

    def plan(self, count: int) -> Bins | None:
        """`count` micro-batches, at least `self.count`, the costliest first; None if there are fewer rows."""
        if count > len(self.sequences):
            return None
        found = pack(self.sequences, self.budget, at_least=count)
        return _costliest_first(found.bins, found.loads)


class SizePlanner:
    """Micro-batches of `size` rows each."""

    def __init__(self, sequences: Sequence[np.ndarray], size: int, cost: ModelCost) -> None:
        self.sequences, self.size, self.cost = sequences, size, cost
        self.count = -(-len(sequences) // size)

    def plan(self, count: int) -> Bins | None:
        """`self.count` micro-batches, the costliest first; None for another count, or if rows are left over."""
        if len(self.sequences) % self.size or count != self.count:
            return None
        found = partition(self.sequences, count, cost=self.cost, sizes=[self.size] * count)
        return _costliest_first(found.bins, found.loads)


def _costliest_first(bins: Bins, costs: Sequence[float]) -> Bins:
    order = np.argsort([-cost for cost in costs], kind="stable")
    return [bins[index] for index in order]
