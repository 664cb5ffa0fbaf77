"""TreeLayout and ScoredEdges: which edges are scored, which rows they are read from, and the way back to sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, PrefixTree, TreeLayout
from dta_plugin.tree import ScoredEdges, layout
from tests.support.trees import SHAPES, Sequences, sequence_batches


def check_against_definition(sequences: Sequences, scored: list[list[bool]] | None) -> None:
    tree = PrefixTree.from_sequences(sequences)
    edges = ScoredEdges.from_tree(tree, scored)
    scored_tokens = {
        (s, i)
        for s, sequence in enumerate(sequences)
        for i in range(1, len(sequence))
        if scored is None or scored[s][i]
    }
    targets = sorted({int(tree.path(s)[i]) for s, i in scored_tokens})
    rows = sorted({int(tree.parent[t]) for t in targets})

    assert edges.target.tolist() == targets
    assert edges.rows.tolist() == rows
    assert [rows[r] for r in edges.row_of_edge] == [int(tree.parent[t]) for t in targets]
    assert edges.lengths == [len(s) - 1 for s in sequences]
    values = torch.arange(1.0, len(targets) + 1)
    for s, row in enumerate(edges.per_sequence(values)):
        expected = [
            targets.index(int(tree.path(s)[i])) + 1 if (s, i) in scored_tokens else 0 for i in range(1, len(row) + 1)
        ]
        assert row.tolist() == expected


@pytest.mark.parametrize("name", SHAPES)
def test_every_token_scored(name: str) -> None:
    check_against_definition(SHAPES[name], None)


@given(st.data(), sequence_batches())
def test_random_masks(data: st.DataObject, sequences: Sequences) -> None:
    scored = [data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in sequences]
    check_against_definition(sequences, scored)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sequences=sequence_batches(), block=st.sampled_from([1, 7]))
def test_whatever_is_gone_through_at_once(
    data: st.DataObject, sequences: Sequences, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = [data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in sequences]
    temperatures = [data.draw(st.sampled_from([0.5, 0.7, 1.0])) for _ in sequences]
    tree = PrefixTree.from_sequences(sequences)
    expected = ScoredEdges.from_tree(tree, scored, temperatures=temperatures)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "_BLOCK", block)
        check_against_definition(sequences, scored)
        actual = ScoredEdges.from_tree(tree, scored, temperatures=temperatures)
    for name in ("target", "rows", "row_of_edge", "edge_of_token", "temperature"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


@given(st.data(), sequence_batches())
def test_an_int_is_the_first_scored_token(data: st.DataObject, sequences: Sequences) -> None:
    tree = PrefixTree.from_sequences(sequences)
    first = [data.draw(st.integers(1, len(s) + 2)) for s in sequences]
    by_int = ScoredEdges.from_tree(tree, first)
    by_mask = ScoredEdges.from_tree(tree, [torch.arange(len(s)) >= b for s, b in zip(sequences, first, strict=True)])
    assert torch.equal(by_int.target, by_mask.target)
    assert torch.equal(by_int.edge_of_token, by_mask.edge_of_token)


def test_mask_types_agree() -> None:
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    row = [False, True, True]
    expected = ScoredEdges.from_tree(tree, [row, row])
    for convert in (np.array, torch.tensor, tuple):
        actual = ScoredEdges.from_tree(tree, [convert(row), np.int64(1)])
        assert torch.equal(actual.edge_of_token, expected.edge_of_token)


def test_gradient_of_a_shared_edge_is_the_sum_over_its_sequences() -> None:
    tree = PrefixTree.from_sequences([[5, 6, 7]] * 700 + [[5, 6, 8]] * 300)
    edges = ScoredEdges.from_tree(tree, None)
    values = torch.zeros(3, requires_grad=True)
    edges.per_token(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1000.0, 700.0, 300.0]


def test_nothing_scored_gives_zeros_with_a_graph() -> None:
    tree = PrefixTree.from_sequences([[1, 2, 3], [4]])
    edges = ScoredEdges.from_tree(tree, [3, 1])
    values = torch.zeros(0, requires_grad=True)
    rows = edges.per_sequence(values)
    assert [row.tolist() for row in rows] == [[0.0, 0.0], []]
    assert all(row.requires_grad for row in rows)


def test_layout_is_the_tree_as_tensors() -> None:
    tree = PrefixTree.from_sequences(SHAPES["forest"])
    layout = TreeLayout.from_tree(tree)
    for name in ("parent", "depth", "exit", "multiplicity"):
        assert getattr(layout, name).tolist() == getattr(tree, name).tolist()
    assert layout.input_ids.tolist() == tree.tokens.tolist()
    assert layout.input_ids.dtype is torch.int64


INVALID: dict[str, tuple[list[object], str]] = {
    "too few entries": ([1], r"1 entries for 2 sequences.*one int or bool mask per sequence"),
    "too many entries": ([1, 1, 1], r"3 entries for 2 sequences"),
    "token 0": ([1, 0], r"scored\[1\] is 0.*>= 1: token 0 has no log-prob"),
    "negative": ([-1, 1], r"scored\[0\] is -1"),
    "short mask": ([[True, True], 1], r"scored\[0\] has shape \(2,\).*bool mask of shape \(3,\).*or an int"),
    "log-prob mask": ([1, torch.ones(1, dtype=torch.bool)], r"scored\[1\] has shape \(1,\).*shape \(2,\)"),
    "2-D mask": ([torch.ones(1, 3, dtype=torch.bool), 1], r"shape \(1, 3\)"),
    "int mask": ([[0, 1, 1], 1], r"scored\[0\] has shape \(3,\) and dtype int64.*bool mask"),
    "float mask": ([torch.ones(3), 1], r"dtype float32.*bool mask"),
    "a bool": ([True, 1], r"scored\[0\] has shape \(\) and dtype bool"),
    "none": ([None, 1], r"scored\[0\] has shape \(\) and dtype object"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_scored(case: str) -> None:
    scored, message = INVALID[case]
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2]])
    with pytest.raises(InvalidInputError, match=message):
        ScoredEdges.from_tree(tree, scored)  # type: ignore[arg-type]
