"""Cutting a batch into trees of bounded size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import PrefixTree
from dta_plugin.tree.split import split_by_tokens
from tests.support.trees import SHAPES, Sequences, sequence_batches


def tree_tokens(sequences: Sequences, group: list[int]) -> int:
    return len({tuple(sequences[s][: i + 1]) for s in group for i in range(len(sequences[s]))})


def check(sequences: Sequences, budget: int) -> None:
    tree = PrefixTree.from_sequences(sequences)
    groups = [group.tolist() for group in split_by_tokens(tree, budget)]
    assert [s for group in groups for s in group] == tree.order.tolist(), "each sequence once, along the sorted order"
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        assert tree_tokens(sequences, group) <= budget or len(group) == 1
        if following:
            assert tree_tokens(sequences, [*group, following[0]]) > budget, "no group ends before it must"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("budget", [1, 4, 16, 10_000])
def test_shapes(name: str, budget: int) -> None:
    check(SHAPES[name], budget)


@given(sequence_batches(), st.integers(1, 60))
def test_random_batches(sequences: Sequences, budget: int) -> None:
    check(sequences, budget)


def test_a_large_budget_keeps_one_tree() -> None:
    tree = PrefixTree.from_sequences(SHAPES["forest"])
    (group,) = split_by_tokens(tree, tree.tree_tokens)
    assert np.array_equal(group, tree.order)
    assert len(split_by_tokens(tree, tree.tree_tokens - 1)) == 2
