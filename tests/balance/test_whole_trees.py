"""`partition(whole_trees=True)`: trees are cut where counts need it and nowhere else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError
from dta_plugin.balance import Partition, partition
from dta_plugin.balance.starts import filled_in_order
from tests.support.dealing import loads_are_true
from tests.support.trees import Sequences


def trees(sizes: list[int], prompt: int = 3, seed: int = 0) -> Sequences:
    """One tree per size; every tree's tokens are its own."""
    generator = np.random.default_rng(seed)
    return [
        [tree] * prompt + generator.integers(1000, 2000, generator.integers(1, 60)).tolist()
        for tree, size in enumerate(sizes)
        for _ in range(size)
    ]


def cuts(found: Partition, sequences: Sequences) -> int:
    pieces = sum(len({sequences[s][0] for s in members}) for members in found.bins)
    return pieces - len({sequence[0] for sequence in sequences})


@pytest.mark.parametrize("seed", range(10))
def test_no_tree_is_cut_where_counts_divide(seed: int) -> None:
    sequences = trees([4] * 12, seed=seed)
    whole = partition(sequences, 3, sizes="equal", whole_trees=True)
    assert cuts(whole, sequences) == 0 and loads_are_true(whole, sequences)
    assert whole.imbalance < 1.1


def test_else_it_is_cut_where_that_pays() -> None:
    """Negative control: short prompts are worth repeating for a better balance."""
    sequences = trees([4] * 6)
    free, whole = (partition(sequences, 3, sizes="equal", whole_trees=whole) for whole in (False, True))
    assert cuts(free, sequences) > 0 and max(free.loads) < max(whole.loads)


def test_counts_that_one_way_to_fill_divides() -> None:
    sequences = trees([1, 2, 3, 2])
    assert cuts(partition(sequences, 2, sizes="equal", whole_trees=True), sequences) == 0


@pytest.mark.parametrize("sizes", [[3, 3, 2], [5, 5, 5, 5], [9, 1, 1, 1], [12]])
def test_as_few_cuts_as_counts_need(sizes: list[int]) -> None:
    sequences = trees(sizes)
    found = partition(sequences, 2, sizes="equal", whole_trees=True)
    divides = any(2 * sum(sizes[i] for i in chosen) == sum(sizes) for chosen in _subsets(len(sizes)))
    assert cuts(found, sequences) == (0 if divides else 1)
    assert [len(members) for members in found.bins] == [len(sequences) // 2] * 2


def _subsets(count: int) -> list[list[int]]:
    return [[i for i in range(count) if chosen[i]] for chosen in product([0, 1], repeat=count)]


def test_whole_trees_need_sizes() -> None:
    with pytest.raises(InvalidInputError, match="sizes"):
        partition(trees([2, 2]), 2, whole_trees=True)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10), st.integers(1, 5))
def test_filled_in_order_deals_out_every_part_once(counts: list[int], bins: int) -> None:
    sizes = [len(part) for part in np.array_split(np.arange(sum(counts)), bins)]
    filled = filled_in_order(counts, sizes)
    assert [sum(b - a for _, a, b in parts) for parts in filled] == sizes
    parts = sorted((item, part) for bin_ in filled for item, a, b in bin_ for part in range(a, b))
    assert parts == [(item, part) for item, count in enumerate(counts) for part in range(count)]
    first = {item for item, _, _ in filled[0]}
    exact = [chosen for chosen in _subsets(len(counts)) if sum(counts[i] for i in chosen) == sizes[0]]
    if exact:  # without a cut, and of all such ways the one with the earliest items
        assert all(b - a == counts[item] for item, a, b in filled[0])
        assert sorted(first) == min(exact)


def test_filled_in_order_keeps_the_order_where_counts_divide() -> None:
    assert filled_in_order([2, 2, 2, 2], [4, 4]) == [[(0, 0, 2), (1, 0, 2)], [(2, 0, 2), (3, 0, 2)]]
    assert filled_in_order([3, 3, 2], [4, 4]) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]
