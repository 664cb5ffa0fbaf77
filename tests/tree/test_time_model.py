"""Rates fitted to times: recovered where times are linear, never negative, and errors for what cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.tree.cost import ModelCost, Padded
from dta_plugin.tree.time_model import SecondsPerFlop, Work
from tests.support.trees import star

rates = st.floats(1e-12, 1e-9)


def batches(count: int = 12) -> list[Work]:
    generator = np.random.default_rng(0)
    return [Work(1.0, *generator.uniform(1e6, 1e9, size=3)) for _ in range(count)]


@given(st.floats(1e-3, 1.0), rates, rates, rates)
def test_linear_times_are_recovered(call: float, linear: float, attention: float, head: float) -> None:
    true = SecondsPerFlop(call, linear, attention, head)
    found = SecondsPerFlop.fit(batches(), [true.seconds(work) for work in batches()])
    for work in batches():
        assert found.seconds(work) == pytest.approx(true.seconds(work), rel=1e-6)


@given(st.lists(st.floats(1e-3, 10.0), min_size=12, max_size=12))
def test_rates_are_never_negative(seconds: list[float]) -> None:
    found = SecondsPerFlop.fit(batches(), seconds)
    assert min(found.call, found.linear, found.attention, found.head) >= 0


def test_relative_errors_count() -> None:
    """A batch of 10 ms that is off by half matters as much as one of 10 s: plain least squares would not see it."""
    small, large = Work(1.0, 0.0, 0.0, 0.0), Work(1.0, 1e10, 0.0, 0.0)
    found = SecondsPerFlop.fit([small, small, large, large], [0.010, 0.010, 10.0, 10.1])
    assert found.call == pytest.approx(0.010, rel=1e-3)


def test_a_part_that_no_batch_has_costs_nothing() -> None:
    work = [Work(1.0, 1e6 * i, 0.0, 0.0) for i in range(1, 6)]
    found = SecondsPerFlop.fit(work, [0.1 + 0.01 * i for i in range(1, 6)])
    assert (found.attention, found.head) == (0.0, 0.0)
    assert (found.call, found.linear) == (pytest.approx(0.1), pytest.approx(1e-8))


@pytest.mark.parametrize("seconds", [[1.0] * 3, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, float("nan"), 1.0], [1.0] * 5])
def test_refuses(seconds: list[float]) -> None:
    count = 3 if len(seconds) == 3 else 4
    with pytest.raises(InvalidInputError, match="Expected at least four, all above 0 s"):
        SecondsPerFlop.fit(batches(count), seconds)


def test_a_cost_in_seconds_is_the_work_times_the_rates() -> None:
    cost = ModelCost(per_token=100.0, per_pair=7.0, per_scored=30.0, per_window_pair=((3, 5.0),))
    rates = SecondsPerFlop(0.5, 1e-3, 1e-4, 1e-5)
    tree = PrefixTree.from_sequences(star(4))
    work = cost.work(tree.tree_tokens, tree.depth, 9)
    seconds = cost.in_seconds(rates)
    assert seconds.per_call == 0.5
    in_seconds = seconds.flops(tree.tree_tokens, tree.depth, 9)
    assert in_seconds + seconds.per_call == pytest.approx(rates.seconds(work))


@pytest.mark.parametrize(("has_padding", "pairs"), [(True, 4 * 10 * 10), (False, 4 * 10 * 11 / 2)])
def test_padded_batches_count_what_dense_attention_computes(has_padding: bool, pairs: float) -> None:
    cost = ModelCost(per_token=100.0, per_pair=7.0, per_scored=30.0, per_window_pair=((3, 5.0),))
    work = cost.padded_work(Padded(rows=4, width=10, columns=6, has_padding=has_padding))
    assert work == Work(1.0, 100.0 * 40, 12.0 * pairs, 30.0 * 24)
