"""What `dta inspect` finds without making the trees: the same as with them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dta_plugin import PrefixTree
from dta_plugin.cli import inspection
from dta_plugin.cli.inspection import inspect_sequences
from dta_plugin.cli.model_loading import Geometry
from dta_plugin.cli.rollouts import TokenizedSequence
from dta_plugin.tree import ScoredEdges
from dta_plugin.tree.cost import estimate
from dta_plugin.tree.divergence import Fork, find_forks

MODEL = Geometry().cost()
PHRASE = list(range(50, 62))


def rollouts(groups: int, seed: int, repeating: float) -> list[TokenizedSequence]:
    """Groups of up to six sequences after one prompt, some of which repeat a phrase."""
    draw = random.Random(seed)
    found = []
    for group in range(groups):
        prompt = [draw.randrange(9) for _ in range(draw.randrange(1, 9))]
        for _ in range(draw.randrange(1, 7)):
            answer = [draw.randrange(40) for _ in range(draw.randrange(1, 30))]
            answer += PHRASE[draw.randrange(3) :] if draw.random() < repeating else []
            found.append(TokenizedSequence(str(group), np.array(prompt + answer, dtype=np.uint8), len(prompt)))
    draw.shuffle(found)
    return found


def forks_of_all(sequences: list[TokenizedSequence], limit: int, run_length: int) -> list[tuple[str, Fork]]:
    """The oracle: a tree of every group."""
    found: list[tuple[str, Fork]] = []
    for name in dict.fromkeys(sequence.group for sequence in sequences):
        tree = PrefixTree.from_sequences([s.tokens for s in sequences if s.group == name])
        found += [(name, fork) for fork in find_forks(tree, None, None, run_length)]
    return sorted(found, key=lambda item: (-item[1].repeated, -item[1].apart))[:limit]


@pytest.mark.parametrize("repeating", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_forks_of_many_groups(seed: int, repeating: float) -> None:
    sequences = rollouts(40, seed, repeating)
    for limit in (1, 3, 200):
        found = inspect_sequences(sequences, MODEL, None, limit, 8)
        assert [(item.group, item.fork) for item in found.forks] == forks_of_all(sequences, limit, 8)


def test_few_groups_become_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    rank = inspection.rank_forks
    monkeypatch.setattr(inspection, "rank_forks", lambda *arguments: (searched.append(1), rank(*arguments))[1])
    inspect_sequences(rollouts(300, 0, 0.0), MODEL, None, 3, 8)
    assert 1 <= len(searched) < 30


@pytest.mark.parametrize("groups", [1, 7])
def test_costs_are_those_of_the_trees(groups: int) -> None:
    sequences = rollouts(groups, 5, 0.3)
    found = inspect_sequences(sequences, MODEL, None)
    dense = tree_cost = 0.0
    for name in dict.fromkeys(sequence.group for sequence in sequences):
        own = [sequence for sequence in sequences if sequence.group == name]
        tree = PrefixTree.from_sequences([sequence.tokens for sequence in own])
        rows = len(ScoredEdges.from_tree(tree, [sequence.first_scored for sequence in own]).rows)
        cost = estimate(tree, MODEL, sum(len(s.tokens) - s.first_scored for s in own), rows)
        dense, tree_cost = dense + cost.dense, tree_cost + cost.tree
    assert (found.within.dense_flops, found.within.tree_flops) == (dense, tree_cost)
    assert found.whole.tree_tokens == PrefixTree.from_sequences([s.tokens for s in sequences]).tree_tokens
