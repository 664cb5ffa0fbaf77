"""Micro-batches under a token budget: nothing above it that could be parted, and few of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError
from dta_plugin.balance import Partition, pack
from dta_plugin.balance.costs import TOKENS, TYPICAL
from dta_plugin.tree.cost import ModelCost
from tests.support.dealing import CLOSE, WINDOWED, groups, loads_are_true, tree_cost
from tests.support.trees import Sequences, run, sequence_batches


def check(sequences: Sequences, capacity: float, cost: ModelCost = TOKENS, at_least: int = 1) -> Partition:
    found = pack(sequences, capacity, cost=cost, at_least=at_least)
    assert sorted(s for members in found.bins for s in members) == list(range(len(sequences)))
    assert all(found.bins) and len(found.bins) >= at_least
    assert loads_are_true(found, sequences, cost)
    for members, load in zip(found.bins, found.loads, strict=True):
        assert load <= capacity * (1 + CLOSE) or len(members) == 1
    return found


@given(sequence_batches(max_sequences=12), st.integers(1, 60), st.integers(1, 3))
def test_no_bin_is_above_the_capacity_unless_one_sequence_is(
    sequences: Sequences, capacity: int, at_least: int
) -> None:
    found = check(sequences, capacity, at_least=min(at_least, len(sequences)))
    if capacity >= tree_cost(sequences, TOKENS):
        assert len(found.bins) == min(at_least, len(sequences))


@given(sequence_batches(max_sequences=12), st.floats(1.0, 3000.0))
def test_capacity_in_units_of_a_model(sequences: Sequences, capacity: float) -> None:
    """Windows, and a call that every bin pays."""
    check(sequences, capacity, WINDOWED)
    check(sequences, capacity / 30, TYPICAL)


@pytest.mark.parametrize("capacity", [2000, 4000, 8000])
@pytest.mark.parametrize("common", [(), tuple(range(3, 40))])
def test_few_bins(capacity: int, common: tuple[int, ...]) -> None:
    sequences = groups(64, 8, common=common)
    found = check(sequences, capacity)
    least = math.ceil((tree_cost(sequences, TOKENS) - len(common)) / (capacity - len(common)))
    assert least <= len(found.bins) <= math.ceil(1.02 * least)


def test_a_sequence_above_the_capacity_is_alone() -> None:
    found = check([run(100), run(90), [1200], [1201, 1202]], 50)
    assert sorted(map(sorted, found.bins)) == [[0], [1], [2, 3]]


def test_all_ranks_can_run_as_many_micro_batches() -> None:
    sequences = groups(6, 4)
    few = len(check(sequences, 2000).bins)
    assert len(check(sequences, 2000, at_least=few + 2).bins) == few + 2
    assert list(map(len, check(sequences, 2000, at_least=24).bins)) == [1] * 24


def test_errors() -> None:
    with pytest.raises(InvalidInputError, match="no sequences to pack"):
        pack([], 10)
    with pytest.raises(InvalidInputError, match=r"capacity=0. Expected a positive"):
        pack([[1]], 0)
    with pytest.raises(InvalidInputError, match="2 sequences for 3 bins"):
        pack([[1], [2]], 10, at_least=3)
