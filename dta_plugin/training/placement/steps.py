"""Which row of a batch goes to which rank and into which optimizer step: siblings together, ranks that cost alike.

A trainer cuts a batch into one equal, contiguous part per rank, and each part into mini-batches. The k-th mini-batches
of all ranks are one optimizer step. So every rank gets as many rows of every step, and these (a share) are whole
groups, since each share computes a group's prefix for itself. A group is cut where counts leave no other way, and in
one more case: few groups of very different lengths, kept whole, would make the costliest rank dearer than an even part
of rows that share nothing. In a step with such a cut there may be more where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dta_plugin.balance import Partition, partition_each
from dta_plugin.balance.costs import TOKENS, TYPICAL, SequenceCosts, loads
from dta_plugin.balance.starts import filled_in_order
from dta_plugin.tree.cost import ModelCost

# By how much more cuts than counts need have to relieve the costliest rank.
_WORTH_CUTTING = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class GroupedRows:
    """Rows of a batch by what siblings share.

    sequences: per row int64 token ids, after one that only rows of its group have (its number); of a padding row that
    one alone. So padding rows cost next to nothing wherever they are; each has a group of its own. lengths: per row its
    tokens.
    """

    sequences: list[np.ndarray]
    lengths: list[int]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def groups(self) -> np.ndarray:
        """int64 [rows]: the number of each row's group, in the order in which groups were sampled."""
        return np.array([sequence[0] for sequence in self.sequences])


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """shares: [step][rank] rows, siblings next to each other. rank_loads: [step][rank] predicted cost.

    groups, split: how many there are, and how many of them in several shares. flat_tokens; tree_tokens with what
    siblings share computed once per batch, and share_tokens once per share; all without padding rows, and without what
    different groups have in common, such as a system prompt: a micro-batch may share more.
    """

    shares: list[list[list[int]]]
    rank_loads: list[list[float]]
    groups: int
    split: int
    flat_tokens: int
    tree_tokens: int
    share_tokens: int

    @property
    def ranks(self) -> list[list[int]]:
        """Per rank its rows, step after step."""
        return [[row for share in shares for row in share] for shares in zip(*self.shares, strict=True)]

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean, over steps, in each of which ranks wait for the costliest."""
        return sum(map(max, self.rank_loads)) * len(self.rank_loads[0]) / sum(map(sum, self.rank_loads))

    def __str__(self) -> str:
        return (
            f"{sum(map(len, self.ranks))} rows of {self.groups} groups; ranks: {len(self.ranks)}, optimizer steps: "
            f"{len(self.shares)}, groups split: {self.split}, max/mean load: {self.imbalance:.3f}; siblings share "
            f"{self.flat_tokens / self.share_tokens:.2f}x of {self.flat_tokens / self.tree_tokens:.2f}x"
        )


def place_rows(batch: GroupedRows, ranks: int, steps: int, beside: ModelCost | None = None) -> Placement:
    """Place a batch. ranks * steps must divide its rows. beside: costs of a model that runs every row dense.

    Groups keep the order in which they were sampled: the first ones that fill a step are the first step, and so on.
    What a row costs has no influence on its step, only on its rank. Padding rows, which cost next to nothing, are dealt
    out to all steps, so that these have about as many rows to learn from.
    """
    costs = SequenceCosts.from_sequences(batch.sequences, TYPICAL, beside=beside)
    groups = batch.groups
    waiting = _groups_in_order(costs.order, groups)
    real = [rows for rows in waiting if len(batch.sequences[rows[0]]) > 1]
    padding = [int(row) for rows in waiting if len(batch.sequences[rows[0]]) == 1 for row in rows]
    size = len(batch) // steps
    of_steps = []
    for parts in filled_in_order(list(map(len, real)), _real_rows(list(map(len, real)), steps, size)):
        rows = [row for group, a, b in parts for row in real[group][a:b]]
        missing = size - len(rows)
        of_steps.append(rows + padding[:missing])
        padding = padding[missing:]
    by_rank = _to_ranks([_step(batch.sequences, groups, rows, ranks, beside) for rows in of_steps])
    shares = [[_costliest_first(costs, groups, share) for share, _ in step] for step in by_rank]
    return _described(batch, shares, [[load for _, load in step] for step in by_rank])


def _real_rows(counts: Sequence[int], steps: int, size: int) -> list[int]:
    """Per step how many of its `size` rows are no padding: about as many in each, and whole groups if there is room.

    counts: rows of every group, in the order in which they come.
    """
    total, ends = sum(counts), np.cumsum([0, *counts])
    bounds = [0]
    for step in range(1, steps):
        least, most = max(bounds[-1], total - size * (steps - step)), min(total, bounds[-1] + size)
        even = total * step / steps
        possible = ends[(ends >= least) & (ends <= most)]
        nearest = possible[np.abs(possible - even).argmin()] if len(possible) else np.clip(round(even), least, most)
        bounds.append(int(nearest))
    return [b - a for a, b in pairwise([*bounds, total])]


def _groups_in_order(order: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Per group its rows in depth-first order, so that a cut goes along the tree. order: int64 [rows], depth-first."""
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _step(
    sequences: list[np.ndarray], groups: np.ndarray, rows: list[int], ranks: int, beside: ModelCost | None
) -> Partition:
    """The rows of one optimizer step over the ranks."""
    (whole,) = partition_each(sequences, [rows], ranks, sizes="equal", whole_trees=True, beside=beside)
    pieces = sum(len(set(groups[share].tolist())) for share in whole.bins)
    is_cut = pieces > len(set(groups[rows].tolist()))
    without_sharing = SequenceCosts.from_sequences([sequences[row] for row in rows], TYPICAL, beside=beside).path.sum()
    if not is_cut and max(whole.loads) <= without_sharing / ranks:
        return whole
    (cut,) = partition_each(sequences, [rows], ranks, sizes="equal", beside=beside)
    return cut if max(cut.loads) < (1 - _WORTH_CUTTING) * max(whole.loads) else whole


def _to_ranks(steps: Sequence[Partition]) -> list[list[tuple[list[int], float]]]:
    """Per step and rank the share and its load; the costliest share to the rank with the least to do so far.

    Log-probs are computed for all steps at once, so the sum matters as well.
    """
    total = np.zeros(len(steps[0].bins))
    result = []
    for step in steps:
        by_load = sorted(zip(step.bins, step.loads, strict=True), key=lambda share: -share[1])
        ranks = total.argsort(kind="stable").tolist()
        shares = dict(zip(ranks, by_load, strict=True))
        result.append([shares[rank] for rank in range(len(total))])
        total += [load for _, load in result[-1]]
    return result


def _costliest_first(costs: SequenceCosts, groups: np.ndarray, share: list[int]) -> list[int]:
    """Groups by cost: the contiguous micro-batches of a static batch size, at which ranks meet, then cost alike."""
    bounds = [0, *(np.flatnonzero(np.diff(groups[share])) + 1).tolist(), len(share)]
    parts = [share[a:b] for a, b in pairwise(bounds)]
    by_cost = np.argsort([-load for load in loads(costs, parts)], kind="stable")
    return [row for part in by_cost for row in parts[part]]


def _described(batch: GroupedRows, shares: list[list[list[int]]], rank_loads: list[list[float]]) -> Placement:
    groups = batch.groups
    tokens = SequenceCosts.from_sequences(batch.sequences, TOKENS)
    is_real = np.array([len(sequence) > 1 for sequence in batch.sequences])
    every = [share for step in shares for share in step]
    present = [set(groups[share].tolist()) for share in every]
    # Every group of a share has one token more than its rows, in front of them.
    in_shares = sum(load - len(found) for load, found in zip(loads(tokens, every), present, strict=True))
    count = np.bincount([group for found in present for group in found])
    return Placement(
        shares,
        rank_loads,
        groups=len(np.unique(groups[is_real])),
        split=int((count > 1).sum()),
        flat_tokens=sum(map(len, batch.sequences)) - len(batch),
        tree_tokens=int(tokens.total) - len(np.unique(groups)),
        share_tokens=int(in_shares),
    )
