"""What an unknown loss allows, and which tokens known ones read."""

from __future__ import annotations

import pytest
import torch

from dta_plugin.training.losses import UNKNOWN, LossTraits, tokens_read, traits_of

TOKENS = LossTraits(sums_over="tokens", without_advantage="tokens", normalises_by="step")
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
ADVANTAGES = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])


def test_unknown_allows_nothing() -> None:
    assert traits_of("mine", {"ours": TOKENS}) is UNKNOWN and traits_of("ours", {"ours": TOKENS}) is TOKENS
    assert not (UNKNOWN.is_known or UNKNOWN.is_token_sum or UNKNOWN.allows_moves)
    assert torch.equal(tokens_read(MASK, ADVANTAGES, UNKNOWN), MASK)


@pytest.mark.parametrize("over", ["batch", "unknown"])
def test_what_reads_rows_beside_it_stays(over: str) -> None:
    assert TOKENS.allows_moves and not LossTraits(sums_over=over, normalises_by="step").allows_moves  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["micro_batch", "columns", "unknown"])
def test_what_is_divided_by_a_micro_batch_stays(by: str) -> None:
    assert not LossTraits(sums_over="tokens", normalises_by=by).allows_moves  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("tokens", [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("rows", [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),  # the advantage of the last row is at a masked token
        ("none", MASK.int().tolist()),
    ],
)
def test_tokens_read(without: str, expected: list[list[int]]) -> None:
    traits = LossTraits(without_advantage=without)  # type: ignore[arg-type]
    assert tokens_read(MASK, ADVANTAGES, traits).int().tolist() == expected


def test_advantages_of_rows() -> None:
    found = tokens_read(MASK, torch.tensor([0.0, 1.0, -1.0]), TOKENS)
    assert found.int().tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 1]]
