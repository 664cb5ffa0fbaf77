"""Streamed execution against the oracle, for every budget: log-probs, entropies and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dta_plugin import TreeConfig
from tests.support.models import softmax_in_own_dtype
from tests.support.oracle import Scored, dense, difference
from tests.support.tree_run import STREAMED_FAMILIES, TOLERANCE, model_pair, through_tree
from tests.support.trees import SHAPES, WIDE, Sequences, fork_at, sequence_batches

BUDGETS = (1, 2, 7, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def check(
    family: str,
    sequences: Sequences,
    budgets: Sequence[int],
    dtype: torch.dtype = torch.float64,
    scored: Scored | None = None,
) -> None:
    pristine, model = model_pair(family, dtype)
    expected = dense(pristine, sequences, scored)
    for budget in budgets:
        config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=budget)
        found = difference(through_tree(model, sequences, scored, config=config, executor="streamed"), expected)
        assert found.worst <= TOLERANCE[dtype], (budget, found)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "deep_chain"])
@pytest.mark.parametrize("family", STREAMED_FAMILIES)
def test_every_shape_and_budget(family: str, name: str, dtype: torch.dtype) -> None:
    check(family, SHAPES[name], BUDGETS if dtype == torch.float32 else (1, 7), dtype)


@pytest.mark.parametrize("budget", [13, 128])
@pytest.mark.parametrize("family", STREAMED_FAMILIES)
def test_long_paths(family: str, budget: int) -> None:
    for sequences in (SHAPES["deep_chain"], fork_at(129, tail=70)):
        check(family, sequences, [budget])


@pytest.mark.long
@pytest.mark.parametrize("name", WIDE)
def test_fan_out_1000(name: str) -> None:
    check("qwen3", WIDE[name], [300])


@given(
    st.sampled_from(STREAMED_FAMILIES),
    sequence_batches(max_sequences=10, max_length=14, min_length=2),
    st.integers(1, 40),
    st.none() | st.integers(1, 6),
)
@settings(max_examples=150)
def test_random_trees(family: str, sequences: Sequences, budget: int, first: int | None) -> None:
    scored = None if first is None else [first] * len(sequences)
    check(family, sequences, [budget], scored=scored)
