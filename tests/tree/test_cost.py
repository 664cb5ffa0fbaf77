"""The cost model against explicit counting of tokens, visible pairs and scored rows; and the report's sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import PrefixTree, TreeReport
from dta_plugin.tree.cost import CostEstimate, ModelCost, estimate
from tests.support.trees import SHAPES, Sequences, sequence_batches, star

MODEL = ModelCost(per_token=1000.0, per_pair=7.0, per_scored=300.0, per_window_pair=((3, 5.0), (8, 2.0)))


def count(lengths_to_token: list[int], scored: int) -> float:
    """FLOPs of tokens that have this many tokens on their path, themselves included."""
    total = 300.0 * scored
    for visible in lengths_to_token:
        total += 1000.0 + 7.0 * visible + 5.0 * min(visible, 3) + 2.0 * min(visible, 8)
    return total


@given(sequence_batches(), st.integers(0, 50), st.integers(0, 50))
def test_counts(sequences: Sequences, scored_dense: int, scored_tree: int) -> None:
    cost = estimate(PrefixTree.from_sequences(sequences), MODEL, scored_dense, scored_tree)
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert cost.dense == count([i + 1 for s in sequences for i in range(len(s))], scored_dense)
    assert cost.tree == count([len(prefix) for prefix in prefixes], scored_tree)


@pytest.mark.parametrize("name", SHAPES)
def test_sharing_saves_and_nothing_else_does(name: str) -> None:
    tree = PrefixTree.from_sequences(SHAPES[name])
    edges = tree.flat_tokens - tree.num_sequences
    cost = estimate(tree, MODEL, edges, edges)
    if tree.compression_ratio > 1:
        assert 0 < cost.saving < 1
        assert cost.ceiling > 1
    else:
        assert (cost.saving, cost.ceiling) == (0.0, 1.0)


def test_ceiling_approaches_the_fan_out() -> None:
    tree = PrefixTree.from_sequences(star(8, prefix=900, branch=1))
    assert 7.8 < estimate(tree, MODEL, 8, 1).ceiling < 8


def test_saving_and_ceiling() -> None:
    cost = CostEstimate(dense=100.0, tree=25.0)
    assert (cost.ceiling, cost.saving) == (4.0, 0.75)


def test_report_says_what_was_shared_and_how_it_ran() -> None:
    tree = PrefixTree.from_sequences(star(4))
    report = TreeReport(
        tree=tree, chunks=1, executor="packed", backend="cpu", reason="because", cost=CostEstimate(2.0, 1.0)
    )
    assert (
        str(report)
        == "4 sequences, 28 -> 13 tokens (2.15x shared, up to 2.00x faster by FLOPs), packed on cpu: because"
    )
    assert [fork.sequences for fork in report.forks()] == [4]
    assert len(report.picture().splitlines()) == 1 + tree.num_nodes  # a line of headings


def test_report_of_a_batch_that_no_loss_reads() -> None:
    tree = PrefixTree.from_sequences([[1], [1], [1]])
    how = {"chunks": 1, "executor": "packed", "backend": "cpu", "reason": "because", "cost": CostEstimate(1.0, 1.0)}
    report = TreeReport(tree=tree, pruned_tokens=57, **how)
    start = "3 sequences, 57 tokens pruned: no loss reads any of them (advantages are 0 where"
    assert report.is_idle and str(report).startswith(start)
    assert not TreeReport(tree=tree, **how).is_idle
    assert not TreeReport(tree=PrefixTree.from_sequences([[1, 2], [1]]), pruned_tokens=57, **how).is_idle
