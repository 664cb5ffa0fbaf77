"""Which rank computes which row: as many per rank as before, ranks that cost alike, siblings together.

Row counts are given, because losses are means over the rows of a micro-batch. What changes is who shares a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dta_plugin.balance import partition
from dta_plugin.balance.costs import SequenceCosts, loads
from dta_plugin.tree.cost import ModelCost

Bins = list[list[int]]

# Loads closer than this are as good as each other: predictions are no better, and moving rows is not free.
_TIE = 0.01


def to_ranks(
    sequences: Sequence[np.ndarray], first_scored: Sequence[int], owner: Sequence[int], cost: ModelCost
) -> list[int]:
    """Per row of all ranks, the rank that is to compute it; as many rows per rank as it has now.

    owner: the rank that has the row now. Ranks wait for the slowest one, so the largest load counts, then the sum. Rows
    stay where they are unless that helps, and as many as possible stay when others move.
    """
    ranks = max(owner) + 1
    held: Bins = [[row for row, rank in enumerate(owner) if rank == r] for r in range(ranks)]
    costs = SequenceCosts.from_sequences(sequences, cost, first_scored)
    sizes = [len(rows) for rows in held]
    dealt = partition(sequences, ranks, cost=cost, first_scored=first_scored, sizes=sizes).bins
    if not improves(loads(costs, dealt), loads(costs, held), max, sum):
        return list(owner)
    destination = list(owner)
    for rows, rank in zip(dealt, _nearest(dealt, held), strict=True):
        for row in rows:
            destination[row] = rank
    return destination


def improves(new: list[float], old: list[float], *by: Callable[[list[float]], float]) -> bool:
    """Whether the first measure that tells them apart is lower."""
    for measure in by:
        if abs(measure(new) - measure(old)) > _TIE * measure(old):
            return measure(new) < measure(old)
    return False


def _nearest(dealt: Bins, held: Bins) -> list[int]:
    """Per bin a rank of its own that already holds as many of its rows as possible, and has room for just as many."""
    overlap = [
        (-len(set(rows) & set(own)), bin_, rank)
        for bin_, rows in enumerate(dealt)
        for rank, own in enumerate(held)
        if len(rows) == len(own)
    ]
    chosen: dict[int, int] = {}
    for _, bin_, rank in sorted(overlap):
        if bin_ not in chosen and rank not in chosen.values():
            chosen[bin_] = rank
    return [chosen[bin_] for bin_ in range(len(dealt))]
