"""The exact variances of token selection against enumerations, and against many drawings of what training draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.token_selection.exact import (
    Outcomes,
    cut_moments,
    prefixes,
    single_variance,
    thinned,
    with_segment,
)
from dta_plugin.token_selection.designs import PrefixCut
from dta_plugin.token_selection.select import TokenSelection, draw
from tests.benchmarks.running import smoke
from tests.support.nat import drawings

LENGTHS = (5, 2, 7, 4)


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.normal(size=(length, 3)) + 0.5 for length in LENGTHS]


def moments(selection: TokenSelection) -> tuple[float, float]:
    designs = [selection.design(length) for length in LENGTHS]
    return cut_moments([design for design in designs if isinstance(design, PrefixCut)], gradients())


def squared_error(weights: np.ndarray) -> float:
    """Of one drawing: how far the group's weighted sum is from the full one, squared."""
    off = sum(row.T @ (w[: len(row)] - 1) for row, w in zip(gradients(), weights, strict=True))
    return float(off @ off)


@pytest.mark.parametrize("scheme", ["rpc", "rpc-uniform", "rpc-two-point"])
def test_rows_that_are_cut_apart(scheme: str) -> None:
    selection = TokenSelection(scheme=scheme, sharing="row")
    carries = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    enumerated = sum(chance * squared_error(one.weights) for one, chance in drawings(selection, carries))
    assert moments(selection)[0] == pytest.approx(enumerated, rel=1e-12)


@pytest.mark.parametrize("floor", [0.1, 0.25, None])
def test_siblings_that_are_cut_together(floor: float | None) -> None:
    """4,000 drawings; a floor of a quarter is on the grid of four siblings. Without the covariance it is far off."""
    selection = TokenSelection(scheme="rpc", floor=floor)
    carries = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    drawn = [draw(selection, carries, [0] * 4, seed=0, step=step, rank=0).weights for step in range(4000)]
    errors = np.array([squared_error(weights) for weights in drawn])
    noise = errors.std() / len(errors) ** 0.5
    own, cross = moments(selection)
    assert abs(errors.mean() - own - cross) < 4 * noise
    assert abs(errors.mean() - own) > 8 * noise


def test_single_tokens() -> None:
    selection, row = TokenSelection(scheme="urs"), gradients()[2]
    off = sum(p * squared_error_of(row, one.weights[0]) for one, p in drawings(selection, np.ones((1, 7), dtype=bool)))
    assert single_variance(selection.design(7).probabilities, row) == pytest.approx(off, rel=1e-12)


def squared_error_of(row: np.ndarray, weights: np.ndarray) -> float:
    off = row.T @ (weights - 1)
    return float(off @ off)


CUTS = prefixes(TokenSelection(scheme="rpc", floor=0.2).design(8).probabilities)


@pytest.mark.parametrize("law", [CUTS, thinned(CUTS, 0.6), with_segment(CUTS, 0.3, 2)])
def test_hybrids_are_unbiased_and_prefixes_that_run_as_far_vary_no_more(law: Outcomes) -> None:
    assert law.chances.sum() == pytest.approx(1, rel=1e-12)
    whole, given = law.weights(), law.weights_given_run()
    for weights in (whole, given):
        np.testing.assert_allclose(law.chances @ weights, 1, rtol=1e-12)
    for alike in (False, True):
        assert law.variance(given, alike) <= law.variance(whole, alike) * (1 + 1e-12)
    assert (given[np.arange(8) >= law.run[:, None]] == 0).all(), "nothing weighs that does not run"


def test_thinning_a_prefix_adds_variance_at_the_same_run() -> None:
    """By the chance alone, however far the prefix reaches; at an even share of 1 it is the prefix."""
    assert thinned(CUTS, 0.6).variance(thinned(CUTS, 0.6).weights(), False) > 1.3 * CUTS.variance(CUTS.weights(), False)
    all_kept = thinned(CUTS, 1.0)
    assert all_kept.variance(all_kept.weights(), False) == pytest.approx(
        CUTS.variance(CUTS.weights(), False), rel=1e-12
    )


@pytest.mark.long
def test_the_benchmark_runs(tmp_path: Path) -> None:
    result = smoke("token_selection.variance", tmp_path).result
    by_way = {line["way"]: line for line in result["by_length"]}
    assert (
        by_way["rpc, floor 1"]["unrelated"] < by_way["rpc, floor 0.8"]["unrelated"] < by_way["rpc-uniform"]["unrelated"]
    )
    for line in result["hybrids"]:
        assert line["run"] == pytest.approx(0.5, abs=1e-4)
        assert line["unrelated"] >= result["hybrids"][0]["unrelated"] * (1 - 1e-9)
