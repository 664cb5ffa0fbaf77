"""What `dta inspect` finds out about a set of sequences, as data: counts, costs, forks. No printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.cli.rollouts import TokenizedSequence
from dta_plugin.cli.terminal import progress, waiting
from dta_plugin.errors import InvalidInputError, did_you_mean
from dta_plugin.tree import PrefixTree
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.counts import TokenRows, TreeCounts
from dta_plugin.tree.divergence import Decoder, Fork, ForkCandidate, rank_forks
from dta_plugin.tree.fork_bounds import fork_bounds


@dataclass(frozen=True, slots=True)
class Sharing:
    """Sharing if each of `trees` micro-batches becomes one tree. Costs are forward FLOPs; backward scales alike."""

    trees: int
    sequences: int
    flat_tokens: int
    tree_tokens: int
    dense_flops: float
    tree_flops: float

    @property
    def ratio(self) -> float:
        return self.flat_tokens / self.tree_tokens

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up over dense."""
        return self.dense_flops / self.tree_flops


@dataclass(frozen=True, slots=True)
class GroupFork:
    """A fork and the group it was found in."""

    group: str
    fork: Fork


@dataclass(frozen=True, slots=True)
class FirstForks:
    """Over the groups whose sequences part: how many, and tokens before their first fork."""

    groups: int
    lowest: int
    median: int
    highest: int


@dataclass(frozen=True, slots=True)
class GroupSharing:
    """One group: its name, the places of its sequences in the list of all, and what they share."""

    name: str
    rows: list[int]
    sharing: Sharing


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """within: every group a tree. whole: all sequences one tree. common: tokens with which all sequences begin.

    forks: the most expensive ones over all groups, at most as many as asked for. shown: the group to draw, its tree.
    groups: all of them, in the order of the file. merged: makes the tree of one of them, by its place there.
    """

    within: Sharing
    whole: Sharing
    common: int
    first_forks: FirstForks | None
    forks: list[GroupFork]
    shown: str
    tree: PrefixTree
    groups: list[GroupSharing]
    merged: Callable[[int], PrefixTree]


@dataclass(frozen=True, slots=True)
class _Group:
    """A group, and the most tokens that a fork of it may have repeated, and apart; apart is -1 where nothing forks."""

    name: str
    number: int
    repeated: int
    apart: int


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A fork, the `place`-th most expensive one of its group, whose tree this is."""

    group: _Group
    place: int
    tree: PrefixTree
    fork: ForkCandidate

    @property
    def cost(self) -> tuple[int, int]:
        return self.fork.repeated, self.fork.apart


def inspect_sequences(
    sequences: Sequence[TokenizedSequence],
    cost: ModelCost,
    decoder: Decoder | None,
    forks: int = 3,
    run_length: int = 16,
    group: str | None = None,
) -> Inspection:
    """Merge the sequences of every group, and of all groups, and find where they part.

    group: the one to draw and to list forks of; None for the one with most tree tokens, and forks of all groups.
    """
    members: dict[str, list[int]] = {}
    for row, sequence in enumerate(sequences):
        members.setdefault(sequence.group, []).append(row)
    names = list(members)
    if group is not None and group not in members:
        shown = ", ".join(names[:8]) + (", .." if len(names) > 8 else "")
        raise InvalidInputError(f"There is no group {group!r}.{did_you_mean(group, names)} Expected one of: {shown}.")
    group_of_row = np.empty(len(sequences), dtype=np.int64)
    for number, own in enumerate(members.values()):
        group_of_row[own] = number
    with waiting("counting what is shared"):
        whole, within, groups = _counted(sequences, names, group_of_row, run_length)
    most = int(within.tree_tokens.argmax()) if group is None else names.index(group)

    drawn: dict[int, PrefixTree] = {}  # the one to draw, once it is made

    def merged(number: int) -> PrefixTree:
        if number in drawn:
            return drawn[number]
        own = members[names[number]]
        order, lcp = within.group(number)
        rows = [sequences[row].tokens for row in own]
        return PrefixTree.from_sorted(rows, np.searchsorted(own, order), lcp, is_compact=True)

    drawn[most] = merged(most)
    searched = groups if group is None else [groups[most]]
    of_groups = _sharing(within, cost)
    shared = _sum(of_groups)
    return Inspection(
        shared,
        shared if whole is within else _sum(_sharing(whole, cost)),
        int(whole.common_tokens()[0]),
        _first_forks(within),
        _top(searched, merged, decoder, forks, run_length),
        names[most],
        drawn[most],
        [GroupSharing(*item) for item in zip(names, members.values(), of_groups, strict=True)],
        merged,
    )


def _counted(
    sequences: Sequence[TokenizedSequence], names: list[str], group_of_row: np.ndarray, run_length: int
) -> tuple[TreeCounts, TreeCounts, list[_Group]]:
    """Counts of all sequences as one tree, of a tree per group, and the groups."""
    rows = TokenRows.from_arrays([sequence.tokens for sequence in sequences])
    first_scored = np.array([sequence.first_scored for sequence in sequences])
    whole = TreeCounts.from_rows(rows, np.zeros_like(group_of_row), first_scored)
    if len(names) == 1:
        return whole, whole, [_Group(names[0], 0, 0, 0)]  # searched in any case
    within = TreeCounts.from_rows(rows, group_of_row, first_scored)
    repeated, apart = fork_bounds(rows, within, run_length)
    numbered = enumerate(zip(names, repeated.tolist(), apart.tolist(), strict=True))
    return whole, within, [_Group(name, number, *bounds) for number, (name, *bounds) in numbered]


def _sharing(counts: TreeCounts, cost: ModelCost) -> list[Sharing]:
    """Of every tree."""
    dense = cost.flops_of_pairs(counts.flat_tokens, counts.flat_pairs, counts.scored_tokens())
    tree = cost.flops_of_pairs(counts.tree_tokens, counts.tree_pairs, counts.scored_rows())
    columns = (counts.sequences, counts.flat_tokens, counts.tree_tokens, dense, tree)
    return [Sharing(1, *values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _sum(trees: list[Sharing]) -> Sharing:
    """Of all together; costs are added up in their order."""
    return Sharing(
        trees=len(trees),
        sequences=sum(tree.sequences for tree in trees),
        flat_tokens=sum(tree.flat_tokens for tree in trees),
        tree_tokens=sum(tree.tree_tokens for tree in trees),
        dense_flops=sum(tree.dense_flops for tree in trees),
        tree_flops=sum(tree.tree_flops for tree in trees),
    )


def _first_forks(counts: TreeCounts) -> FirstForks | None:
    depths = counts.first_forks()
    depths = depths[depths >= 0]
    if not len(depths):
        return None
    return FirstForks(len(depths), int(depths.min()), int(np.median(depths)), int(depths.max()))


def _top(
    groups: list[_Group],
    merged: Callable[[int], PrefixTree],
    decoder: Decoder | None,
    limit: int,
    run_length: int,
) -> list[GroupFork]:
    """The most expensive forks. Groups are searched in the order of what they may hold, until no other can be among
    the first `limit`; equal forks are listed in the order of groups."""
    best: list[_Found] = []
    for group in progress(sorted(groups, key=lambda group: (-group.repeated, -group.apart)), "groups searched"):
        if limit < 1 or group.apart < 0:
            break
        if len(best) == limit and best[-1].cost > (group.repeated, group.apart):
            break
        tree = merged(group.number)
        ranked = rank_forks(tree, limit, run_length)
        best += [_Found(group, place, tree, fork) for place, fork in enumerate(ranked)]
        best.sort(key=lambda found: (-found.fork.repeated, -found.fork.apart, found.group.number, found.place))
        del best[limit:]
    return [GroupFork(found.group.name, found.fork.describe(found.tree, decoder, run_length)) for found in best]
