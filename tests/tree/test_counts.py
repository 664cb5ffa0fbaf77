"""Counts of trees that are not made, against the trees; and bounds of forks, against the forks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dta_plugin import PrefixTree
from dta_plugin.tree import ScoredEdges, counts, fork_bounds
from dta_plugin.tree.cost import ModelCost, estimate
from dta_plugin.tree.counts import TokenRows, TreeCounts
from dta_plugin.tree.divergence import first_fork_depth, rank_forks
from tests.support.trees import SHAPES, Sequences, sequence_batches

MODEL = ModelCost(per_token=7.1, per_pair=0.3, per_scored=1.7, per_window_pair=((3, 0.2), (9, 0.1)))


def counted(
    sequences: Sequences, groups: list[int], first_scored: list[int], dtype: type
) -> tuple[TokenRows, TreeCounts]:
    rows = TokenRows.from_arrays([np.array(sequence, dtype=dtype) for sequence in sequences])
    return rows, TreeCounts.from_rows(rows, np.array(groups), np.array(first_scored))


def check(sequences: Sequences, groups: list[int], first_scored: list[int], dtype: type = np.int64) -> None:
    """groups: numbers from 0 on, none left out."""
    rows, found = counted(sequences, groups, first_scored, dtype)
    dense = MODEL.flops_of_pairs(found.flat_tokens, found.flat_pairs, found.scored_tokens())
    merged = MODEL.flops_of_pairs(found.tree_tokens, found.tree_pairs, found.scored_rows())
    repeated, apart = fork_bounds.fork_bounds(rows, found, 4)
    for group in range(max(groups) + 1):
        own = [row for row, other in enumerate(groups) if other == group]
        members = [sequences[row] for row in own]
        tree = PrefixTree.from_sequences(members)
        edges = ScoredEdges.from_tree(tree, [first_scored[row] for row in own])
        scored = sum(max(0, len(sequences[row]) - first_scored[row]) for row in own)
        cost = estimate(tree, MODEL, scored, len(edges.rows))
        assert (found.sequences[group], found.flat_tokens[group]) == (len(own), tree.flat_tokens)
        assert found.tree_tokens[group] == tree.tree_tokens
        assert (found.flat_pairs()[group], found.tree_pairs()[group]) == (
            tree.flat_visible_pairs(),
            tree.visible_pairs(),
        )
        assert (found.scored_tokens()[group], found.scored_rows()[group]) == (scored, len(edges.rows))
        assert (dense[group], merged[group]) == (cost.dense, cost.tree)
        assert found.common_tokens()[group] == (tree.multiplicity == len(own)).sum()
        depth = first_fork_depth(tree)
        assert found.first_forks()[group] == (-1 if depth is None else depth)
        for fork in rank_forks(tree, None, 4):
            assert fork.repeated <= repeated[group] and fork.apart <= apart[group]
        check_compact(tree, [np.array(member, dtype=dtype) for member in members], found, own, group)


def check_compact(tree: PrefixTree, members: list[np.ndarray], found: TreeCounts, own: list[int], group: int) -> None:
    order, lcp = found.group(group)
    compact = PrefixTree.from_sorted(members, np.searchsorted(own, order), lcp, is_compact=True)
    for name in PrefixTree.__slots__:
        assert np.array_equal(getattr(compact, name), getattr(tree, name))
    assert compact.parent.dtype == np.int32 and compact.tokens.dtype == members[0].dtype
    assert [vars_of(fork) for fork in rank_forks(compact, None, 4)] == [
        vars_of(fork) for fork in rank_forks(tree, None, 4)
    ]


def vars_of(fork: object) -> list[object]:
    return [np.asarray(getattr(fork, name)).tolist() for name in fork.__slots__]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = SHAPES[name]
    if dtype is np.uint8 and max(map(max, sequences)) > 255:
        sequences = [[token % 251 for token in sequence] for sequence in sequences]
    monkeypatch.setattr(counts, "_WIDTH", 3)
    check(sequences, [0] * len(sequences), [1 + row % 5 for row in range(len(sequences))], dtype)
    groups = [row % 3 for row in range(len(sequences))]
    check(sequences, groups if len(groups) > 2 else [0] * len(groups), [2] * len(groups), dtype)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences=sequence_batches(max_length=30), data=st.data(), block=st.sampled_from([2, 40, 1 << 20]))
def test_random_groups(sequences: Sequences, data: st.DataObject, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(sequences)
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    numbers = {group: number for number, group in enumerate(Counter(drawn))}
    first_scored = data.draw(st.lists(st.integers(1, 32), min_size=size, max_size=size))
    with monkeypatch.context() as patch:
        patch.setattr(fork_bounds, "_BLOCK", block)
        patch.setattr(counts, "_BLOCK", max(block, 64))
        patch.setattr(counts, "_WIDTH", 5)
        check(sequences, [numbers[group] for group in drawn], first_scored)


def test_ids_that_need_32_bits() -> None:
    """Sorted and compared as the integers that they are, and not as what is left of them in a byte."""
    sequences = [[2**32 - 1, 256], [0, 2**31], [0, 256], [2**32 - 1, 0]]
    check(sequences, [0] * 4, [1] * 4)
    assert counted(sequences, [0] * 4, [1] * 4, np.int64)[1].order.tolist() == [2, 1, 3, 0]
