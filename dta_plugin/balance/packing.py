"""Pack sequences into few bins of limited cost: micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dta_plugin.balance.costs import TOKENS, Run, SequenceCosts
from dta_plugin.balance.partition import Partition, check_enough
from dta_plugin.balance.starts import BinRuns, packed, places_of, without_empty
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence


def pack(
    sequences: Sequence[TokenSequence],
    capacity: float,
    *,
    cost: ModelCost = TOKENS,
    first_scored: Sequence[int] | None = None,
    at_least: int = 1,
) -> Partition:
    """Deal `sequences` out to few bins that cost at most `capacity` each.

    capacity: in units of `cost`; tree tokens unless another is given. A sequence that alone costs more gets a bin to
    itself: `executor="streamed"` runs it in chunks. first_scored: as for `partition`. at_least: bins there have to be,
    where all ranks run as many micro-batches.

    Raises InvalidInputError for no sequences, a capacity that is not positive, and fewer sequences than `at_least`.
    """
    if not len(sequences):
        raise InvalidInputError("Got no sequences to pack. Expected at least one; skip the call for an empty batch.")
    if capacity <= 0:
        raise InvalidInputError(f"Got capacity={capacity}. Expected a positive cost, in tree tokens by default.")
    check_enough(len(sequences), at_least)
    costs = SequenceCosts.from_sequences(sequences, cost, first_scored)
    variable = costs.without_fixed_cost()
    room = capacity - costs.fixed_cost
    fits = variable.path <= room
    large, small = np.flatnonzero(~fits), np.flatnonzero(fits)
    filled = [large[i : i + 1] for i in range(len(large))]
    if len(small):
        filled += [small[places] for places in places_of(_in_few(variable.subset(small), room))]
    empty = [large[:0]] * (at_least - len(filled))
    return Partition.from_assignment(costs, without_empty(variable, filled + empty))


def _in_few(costs: SequenceCosts, capacity: float) -> BinRuns:
    """In as few bins as `packed` manages with, by bisection."""
    low, high = 0, len(costs)
    best: BinRuns = [[Run(place, place + 1)] for place in range(len(costs))]
    while high - low > 1:
        middle = (low + high) // 2
        found = packed(costs, middle, capacity)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best
