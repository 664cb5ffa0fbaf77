"""What `dta inspect` finds out about a set of sequences, as data: counts, costs, forks. No printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.cli.rollouts import TokenizedSequence
from dta_plugin.cli.terminal import progress, waiting
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree import PrefixTree, ScoredEdges
from dta_plugin.tree.cost import ModelCost, estimate
from dta_plugin.tree.divergence import Decoder, Fork, first_fork_depth, rank_forks


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

    def __add__(self, other: Sharing) -> Sharing:
        return Sharing(
            self.trees + other.trees,
            self.sequences + other.sequences,
            self.flat_tokens + other.flat_tokens,
            self.tree_tokens + other.tree_tokens,
            self.dense_flops + other.dense_flops,
            self.tree_flops + other.tree_flops,
        )


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


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """within: every group a tree. whole: all sequences one tree. common: tokens with which all sequences begin.

    forks: the most expensive ones over all groups, at most as many as asked for. shown: the group to draw, its tree.
    """

    within: Sharing
    whole: Sharing
    common: int
    first_forks: FirstForks | None
    forks: list[GroupFork]
    shown: str
    tree: PrefixTree


def inspect_sequences(
    sequences: Sequence[TokenizedSequence],
    model: ModelCost,
    decoder: Decoder | None,
    forks: int = 3,
    run_length: int = 16,
    group: str | None = None,
) -> Inspection:
    """Merge the sequences of every group, and of all groups, and find where they part.

    group: the one to draw and to list forks of; None for the one with most tree tokens, and forks of all groups.
    """
    members: dict[str, list[TokenizedSequence]] = {}
    for sequence in sequences:
        members.setdefault(sequence.group, []).append(sequence)
    if group is not None and group not in members:
        names = ", ".join(list(members)[:8]) + (", .." if len(members) > 8 else "")
        raise InvalidInputError(f"There is no group {group!r}. Expected one of: {names}.")
    trees = {
        name: PrefixTree.from_sequences([member.tokens for member in own])
        for name, own in progress(members.items(), "groups merged")
    }
    shares = [_sharing(trees[name], own, model) for name, own in members.items()]
    within = sum(shares[1:], start=shares[0])
    if len(trees) == 1:
        tree, whole = next(iter(trees.values())), within
    else:
        with waiting("merging the whole file"):
            tree = PrefixTree.from_sequences([sequence.tokens for sequence in sequences])
            whole = _sharing(tree, sequences, model)
    common = int((tree.multiplicity == len(sequences)).sum())
    shown = group if group is not None else max(trees, key=lambda name: trees[name].tree_tokens)
    searched = trees if group is None else {group: trees[group]}
    return Inspection(
        within, whole, common, _first_forks(trees), _top(searched, decoder, forks, run_length), shown, trees[shown]
    )


def _sharing(tree: PrefixTree, sequences: Sequence[TokenizedSequence], model: ModelCost) -> Sharing:
    edges = ScoredEdges.from_tree(tree, [sequence.first_scored for sequence in sequences])
    scored = sum(max(0, len(sequence.tokens) - sequence.first_scored) for sequence in sequences)
    cost = estimate(tree, model, scored, len(edges.rows))
    return Sharing(1, tree.num_sequences, tree.flat_tokens, tree.tree_tokens, cost.dense, cost.tree)


def _first_forks(trees: dict[str, PrefixTree]) -> FirstForks | None:
    depths = [depth for tree in trees.values() if (depth := first_fork_depth(tree)) is not None]
    if not depths:
        return None
    return FirstForks(len(depths), min(depths), int(np.median(depths)), max(depths))


def _top(trees: dict[str, PrefixTree], decoder: Decoder | None, limit: int, run_length: int) -> list[GroupFork]:
    if limit < 1:
        return []
    ranked = [
        (name, fork)
        for name, tree in progress(trees.items(), "groups searched")
        for fork in rank_forks(tree, limit, run_length)
    ]
    ranked.sort(key=lambda item: (-item[1].repeated, -item[1].apart))
    return [GroupFork(name, fork.describe(trees[name], decoder, run_length)) for name, fork in ranked[:limit]]
