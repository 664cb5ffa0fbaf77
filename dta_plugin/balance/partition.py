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

from dta_plugin.balance.costs import TYPICAL, SequenceCosts
from dta_plugin.balance.starts import free_starts, sized_starts
from dta_plugin.balance.search import relieved
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence

# Bisection ends where the capacity is known this well.
_NEAR = 1.1
# Changes between two bins that are tried in full, of those that look best; sequences up to which single ones move.
_TRIED, _MOST_SINGLES = 8, 2048



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
    allow_empty: bool = False,
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
    own = costs.without_every_bin()
    starts = free_starts(own, bins) if sizes is None else sized_starts(own, list(sizes))
    if sizes is None and not allow_empty:
        starts = [_spread(start) for start in starts]
    worst = [max(map(own.of_ranks, start)) for start in starts]
    near = [start for start, load in zip(starts, worst, strict=True) if load <= _NEAR * min(worst)]
    done = [relieved(own, start, swaps_only=sizes is not None) for start in near]
    filled = min(done, key=lambda f: max(map(own.of_ranks, f)))
    loads = [costs.of_ranks(ranks) for ranks in filled]
    members = [costs.order[ranks].tolist() for ranks in filled]
    repeated = sum(loads) - costs.total - costs.per_call * (sum(map(bool, members)) - 1)
    return Partition(members, loads, costs.lower_bound(bins), repeated)

def _spread(bins):
    for empty in [b for b in range(len(bins)) if not len(bins[b])]:
        full = max(range(len(bins)), key=lambda b: len(bins[b]))
        if len(bins[full])<2: break
        bins[empty], bins[full] = bins[full][-1:], bins[full][:-1]
    return bins
