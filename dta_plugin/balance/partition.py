"""Deal sequences out to bins (ranks, micro-batches) so that the costliest bin costs as little as possible.

A bin computes the prefix tree of its sequences: siblings in one bin share their prefix, siblings in two bins pay for
it twice. So trees stay whole where that balances, and are cut where it pays. `starts` deals everything out in several
ways, `search` improves on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dta_plugin.balance.bound import lower_bound
from dta_plugin.balance.costs import TYPICAL, SequenceCosts
from dta_plugin.balance.search import local_search
from dta_plugin.balance.starts import Assignment, free_starts, sized_starts, whole_starts, without_empty
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """bins: per bin the sequence indices, siblings next to each other. loads: predicted cost of each bin.

    lower_bound: no partition into as many bins has a costliest bin below it. repeated: cost of prefixes that several
    bins compute.
    """

    bins: list[list[int]]
    loads: list[float]
    lower_bound: float
    repeated: float

    @classmethod
    def from_assignment(cls, costs: SequenceCosts, filled: Assignment) -> Partition:
        loads = [costs.of_places(places) for places in filled]
        calls = sum(costs.per_call for places in filled if len(places))
        repeated = sum(loads) - calls - (costs.total - costs.per_call)
        bins = [costs.order[places].tolist() for places in filled]
        return cls(bins, loads, lower_bound(costs, len(filled)), repeated)

    @property
    def imbalance(self) -> float:
        """Largest load over the mean: 1.0 is even."""
        return max(self.loads) * len(self.loads) / sum(self.loads)

    @property
    def weights(self) -> list[float]:
        """Per bin the factor of its loss that makes unequal counts exact.

        Frameworks average over ranks, or micro-batches, what each averaged over its sequences. The mean over bins of
        weight * (mean over the bin's sequences) is the mean over all sequences: weight = count * bins / all. For a
        loss that averages over tokens, count tokens instead. An empty bin weighs 0 and has no mean: give it loss 0.
        """
        total = sum(map(len, self.bins))
        return [len(members) * len(self.bins) / total for members in self.bins]

    def renumbered(self, indices: Sequence[int]) -> Partition:
        """The same for the batch that the sequences were taken from: sequence i is its sequence indices[i]."""
        return replace(self, bins=[[indices[s] for s in members] for members in self.bins])

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
    cost: ModelCost = TYPICAL,
    first_scored: Sequence[int] | None = None,
    sizes: Sequence[int] | Literal["equal"] | None = None,
    allow_empty: bool = False,
    whole_trees: bool = False,
    beside: ModelCost | None = None,
) -> Partition:
    """Deal `sequences` out to `bins` bins.

    cost: what a token, a pair, a scored token and a bin cost; see `models.introspection.model_cost`. first_scored: per
        sequence, where its completion begins (only scored tokens pay for the LM head). sizes: sequences per bin, or
        "equal", for frameworks that need equal counts; None: whatever balances, see `Partition.weights`.
    allow_empty: with sizes=None, bins stay empty where using them would lower nothing. whole_trees: with sizes given,
        trees are cut where counts need it, not where it pays; a tree is what shares more than all sequences do.
    beside: costs of another model that the bins run, dense, such as a critic.

    Raises InvalidInputError for no sequences, fewer than one bin, fewer sequences than bins unless allow_empty, and
    sizes, first_scored or whole_trees that do not fit.
    """
    if not len(sequences):
        raise InvalidInputError(
            "Got no sequences to deal out. Expected at least one; skip the call for an empty batch."
        )
    if bins < 1:
        raise InvalidInputError(f"Got bins={bins}. Expected at least 1.")
    counts = _counts(len(sequences), bins, sizes)
    if whole_trees and counts is None:
        raise InvalidInputError("Got whole_trees=True with sizes=None. Expected sizes, such as 'equal'.")
    if counts is None and not allow_empty:
        check_enough(len(sequences), bins)
    costs = SequenceCosts.from_sequences(sequences, cost, first_scored, beside)
    variable = costs.without_fixed_cost()
    if counts is not None:
        starts = whole_starts(variable, counts) if whole_trees else sized_starts(variable, counts)
    elif allow_empty:
        starts = free_starts(variable, bins)
    else:
        starts = [without_empty(variable, filled) for filled in free_starts(variable, bins)]
    found = local_search(variable, starts, swaps_only=counts is not None, whole=whole_trees)
    return Partition.from_assignment(costs, found)


def partition_each(
    sequences: Sequence[TokenSequence],
    shares: Sequence[Sequence[int]],
    bins: int,
    *,
    first_scored: Sequence[int] | None = None,
    **options: Any,
) -> list[Partition]:
    """Deal every share of a batch out to `bins` bins by itself, with indices into the batch.

    shares: sequence indices of each optimizer step (mini-batch), so that none leaves its step; or `bins` of a partition
    over ranks, to cut every rank's share into micro-batches. options: as for `partition`. A batch for two ranks, each
    with as many rows of every step:

        steps = partition_each(sequences, [range(0, 32), range(32, 64)], 2, sizes="equal")
        rows = [[s for step in steps for s in step.bins[rank]] for rank in range(2)]

    Raises InvalidInputError for an index that is no sequence's or is in two shares, and what `partition` raises.
    """
    indices = [s for share in shares for s in share]
    if len(set(indices)) < len(indices) or not all(0 <= s < len(sequences) for s in indices):
        raise InvalidInputError(
            f"Got shares with {len(indices)} indices, {len(set(indices))} of them different, from "
            f"{min(indices)} to {max(indices)}. Expected indices into {len(sequences)} sequences, each once."
        )
    found = []
    for share in shares:
        begins = None if first_scored is None else [first_scored[s] for s in share]
        found.append(partition([sequences[s] for s in share], bins, first_scored=begins, **options).renumbered(share))
    return found


def check_enough(sequences: int, bins: int) -> None:
    if sequences < bins:
        raise InvalidInputError(
            f"Got {sequences} sequences for {bins} bins. Expected at least one per bin; ask for at most {sequences} "
            "bins, or call partition with allow_empty=True if bins may stay empty."
        )


def _counts(sequences: int, bins: int, sizes: Sequence[int] | Literal["equal"] | None) -> list[int] | None:
    if sizes is None:
        return None
    if isinstance(sizes, str):
        if sizes != "equal" or sequences % bins:
            raise InvalidInputError(
                f"Got sizes={sizes!r} for {sequences} sequences in {bins} bins. Expected counts, None, or "
                "'equal' where the bins divide the sequences; with None, losses are exact with Partition.weights."
            )
        return [sequences // bins] * bins
    if len(sizes) != bins or sum(sizes) != sequences or min(sizes) < 0:
        raise InvalidInputError(
            f"Got sizes={list(sizes)} for {sequences} sequences in {bins} bins. Expected {bins} counts, none "
            f"negative, that add up to {sequences}."
        )
    return list(sizes)
