"""Which row goes where: never dearer than the depth-first cut, groups whole where counts divide."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from dta_plugin.balance.costs import TYPICAL, SequenceCosts, loads
from dta_plugin.training.placement.micro_batches import to_micro_batches
from dta_plugin.training.placement.ranks import to_ranks

Sequences = list[np.ndarray]


def groups(sizes: list[int], seed: int = 0, prompt: int = 40, completion: int = 60) -> tuple[Sequences, list[int]]:
    """Rollouts of one prompt per size, in random order, of very different lengths; and their prompts' lengths."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        shared = generator.integers(100, 50_000, generator.integers(2, prompt))
        lengths = generator.integers(1, completion, size)
        rows += [(np.concatenate([shared, generator.integers(100, 50_000, n)]), len(shared)) for n in lengths]
    rows = [rows[i] for i in generator.permutation(len(rows))]
    return [row for row, _ in rows], [first for _, first in rows]


def first_tokens(sequences: Sequences, rows: list[int]) -> set[int]:
    return {int(sequences[row][0]) for row in rows}


@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_are_never_dearer_than_the_depth_first_cut(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sequences, first_scored = groups(generator.integers(1, 9, 6).tolist(), seed)
    count = int(generator.integers(2, 5))
    sizes = [len(part) for part in np.array_split(np.arange(len(sequences)), count)]
    bins = to_micro_batches(sequences, first_scored, sizes, TYPICAL)
    assert [len(rows) for rows in bins] == sizes and sorted(chain(*bins)) == list(range(len(sequences)))
    costs = SequenceCosts.from_sequences(sequences, TYPICAL, first_scored)
    cut = loads(costs, [rows.tolist() for rows in np.split(costs.order, np.cumsum(sizes)[:-1])])
    assert sum(loads(costs, bins)) <= 1.01 * sum(cut)


def test_micro_batches_even_out_what_the_cut_leaves() -> None:
    """Two groups per micro-batch, the long ones apart, though the long ones are neighbours in depth-first order."""
    prompts = [np.full(4, 10), np.full(4, 20), np.full(80, 30), np.full(80, 40)]
    sequences = [np.append(prompt, 50 + i) for prompt in prompts for i in range(3)]
    bins = to_micro_batches(sequences, [len(row) - 1 for row in sequences], [6, 6], TYPICAL)
    assert sorted(len(first_tokens(sequences, rows) & {30, 40}) for rows in bins) == [1, 1]
    assert all(len(first_tokens(sequences, rows)) == 2 for rows in bins)


def test_ranks_get_whole_groups_and_keep_what_they_have() -> None:
    sequences = [np.array([group, *range(9), 10 + i]) for i in range(4) for group in (1, 2)]
    owner = [0, 0, 0, 0, 1, 1, 1, 1]  # both ranks have two of each group
    destination = to_ranks(sequences, [10] * 8, owner, TYPICAL)
    held = [[row for row in range(8) if destination[row] == rank] for rank in range(2)]
    assert [len(rows) for rows in held] == [4, 4]
    assert all(len(first_tokens(sequences, rows)) == 1 for rows in held)
    assert sum(a != b for a, b in zip(owner, destination, strict=True)) == 4


def test_a_group_is_split_only_where_counts_do_not_divide() -> None:
    sequences = [np.array([group, *range(30), 100 + i]) for i in range(4) for group in (1, 2, 3)]
    owner = [0] * 6 + [1] * 6
    destination = to_ranks(sequences, [31] * 12, owner, TYPICAL)
    held = [first_tokens(sequences, [row for row in range(12) if destination[row] == rank]) for rank in range(2)]
    assert sorted(map(len, held)) == [2, 2] and len(held[0] & held[1]) == 1


def test_rows_stay_where_nothing_is_won() -> None:
    sequences = [np.array([group, *range(9), 10 + i]) for group in (1, 2) for i in range(4)]
    owner = [1, 1, 1, 1, 0, 0, 0, 0]
    assert to_ranks(sequences, [10] * 8, owner, TYPICAL) == owner


def test_ranks_of_heavy_and_light_groups_are_evened_out() -> None:
    sequences, first_scored = groups([4] * 16, seed=5, prompt=400, completion=200)
    order = np.argsort([len(row) for row in sequences])
    owner = np.empty(64, dtype=int)
    owner[order] = np.repeat(np.arange(4), 16)  # the longest rows are all on one rank
    destination = to_ranks(sequences, first_scored, owner.tolist(), TYPICAL)
    costs = SequenceCosts.from_sequences(sequences, TYPICAL, first_scored)
    before, after = (
        loads(costs, [[row for row in range(64) if ranks[row] == rank] for rank in range(4)])
        for ranks in (owner, destination)
    )
    assert max(after) < 0.6 * max(before) and sum(after) < 0.8 * sum(before)
    assert [destination.count(rank) for rank in range(4)] == [16] * 4
