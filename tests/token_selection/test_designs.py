"""Sampling designs against the enumeration of all their outcomes: probabilities and budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dta_plugin.token_selection.designs import (
    Design,
    Independent,
    PrefixCut,
    floored_cut,
    uniform_cut,
)
from dta_plugin.token_selection.select import SCHEMES, TokenSelection
from tests.support.nat import outcomes

LENGTHS = (1, 2, 5, 12)
BUDGETS = (0.15, 0.5, 0.73, 1.0)
MIN_PREFIXES = (1, 3, 12)
FLOORS = (0.1, 0.5, 1.0)
EXACT = 1e-9


def cases(scheme: str) -> list[tuple[TokenSelection, int, Design]]:
    """Every combination of the values above that `scheme` allows: what was asked for, of how many tokens, what came."""
    found = []
    for budget, min_prefix, floor in itertools.product(BUDGETS, MIN_PREFIXES, FLOORS):
        if budget < (0.5 if scheme == "rpc-uniform" else floor):
            continue
        selection = TokenSelection(scheme=scheme, budget=budget, min_prefix=min_prefix, floor=floor)
        found += [(selection, tokens, selection.design(tokens)) for tokens in LENGTHS]
    return found


def enumerated(design: Design) -> tuple[np.ndarray, np.ndarray]:
    """All outcomes: kept, float64 [N, T], and their probabilities, float64 [N]."""
    kept, probabilities = zip(*outcomes(design), strict=True)
    return np.array(kept, dtype=float), np.array(probabilities)


def fewest(selection: TokenSelection, tokens: int) -> float:
    """Tokens that are kept on average however small the budget."""
    certain = min(selection.min_prefix, tokens)
    if selection.scheme == "rpc-uniform":
        return (tokens + certain) / 2
    return certain + selection.floor * (tokens - certain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inclusion_probabilities_are_those_of_the_outcomes(scheme: str) -> None:
    for selection, tokens, design in cases(scheme):
        kept, chances = enumerated(design)
        assert len(np.unique(kept, axis=0)) == len(kept)
        assert chances.sum() == pytest.approx(1, rel=EXACT)
        assert design.probabilities.shape == (tokens,)
        np.testing.assert_allclose(chances @ kept, design.probabilities, rtol=EXACT, err_msg=str(selection))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_first_tokens_are_certain_and_no_weight_passes_its_limit(scheme: str) -> None:
    for selection, tokens, design in cases(scheme):
        probabilities = design.probabilities
        limit = 1 / selection.floor
        if scheme == "rpc-uniform":
            limit = max(tokens - selection.min_prefix + 1, 1)
        assert (probabilities[: selection.min_prefix] == 1).all()
        assert probabilities.min() > 0
        assert (1 / probabilities).max() <= limit * (1 + EXACT)
        if selection.cuts:
            assert isinstance(design, PrefixCut)
            assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_budget_is_met_where_it_can_be(scheme: str) -> None:
    """It cannot below floor and min_prefix, nor below half for uniform cuts."""
    met = 0
    for selection, tokens, design in cases(scheme):
        target, least = selection.budget * tokens, fewest(selection, tokens)
        if target < least:
            assert design.probabilities.sum() == pytest.approx(least, rel=EXACT), (selection, tokens)
        else:
            assert design.probabilities.sum() == pytest.approx(target, rel=EXACT), (selection, tokens)
        met += target >= least
    assert met > 20


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("limits", [{"budget": 1.0}, {"min_prefix": 12}])
def test_all_tokens_at_the_limits_with_weights_of_exactly_1(scheme: str, limits: dict[str, float]) -> None:
    for tokens in LENGTHS:
        design = TokenSelection(scheme=scheme, **limits).design(tokens)  # type: ignore[arg-type]
        assert (design.probabilities == 1).all()
        assert [kept.all() for kept, _ in outcomes(design)] == [True]


@pytest.mark.parametrize("tokens,min_prefix", [(1, 1), (2, 1), (5, 1), (12, 4), (2048, 64)])
def test_uniform_cut_in_closed_form(tokens: int, min_prefix: int) -> None:
    t = np.arange(1, tokens + 1)
    expected = np.where(t <= min_prefix, 1.0, (tokens - t + 1) / (tokens - min_prefix + 1))
    np.testing.assert_allclose(uniform_cut(tokens, 0.5, min_prefix, 0.1).probabilities, expected, rtol=EXACT)


@pytest.mark.parametrize("tokens,floor", [(2, 0.5), (12, 0.2), (2048, 0.1)])
def test_floored_cut_in_closed_form(tokens: int, floor: float) -> None:
    """At the budget at which it falls to the floor just behind the last token."""
    t = np.arange(1, tokens + 1)
    expected = floor + (1 - floor) * (tokens - t + 1) / tokens
    np.testing.assert_allclose(floored_cut(tokens, expected.mean(), 1, floor).probabilities, expected, rtol=EXACT)


@pytest.mark.parametrize("budget", [0.51, 0.9, 0.999, 1 - 1e-9, float(np.nextafter(1, 0))])
@pytest.mark.parametrize("tokens", [2, 100, 10_000])
def test_budgets_just_below_all_tokens_are_met(budget: float, tokens: int) -> None:
    for law in (uniform_cut, floored_cut):
        target = max(budget * tokens, (tokens + 1) / 2 if law is uniform_cut else 1 + 0.1 * (tokens - 1))
        assert law(tokens, budget, 1, 0.1).probabilities.sum() == pytest.approx(target, rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weighted_sums_have_the_full_sum_as_mean(scheme: str) -> None:
    """Whatever the token's term: here a clipped ratio, a KL term and noise that grows along the row."""
    rng = np.random.default_rng(1)
    for _, tokens, design in cases(scheme):
        log_ratio, advantage = rng.normal(size=(2, tokens))
        ratio = np.exp(log_ratio)
        terms = np.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage) - 0.1 * (1 / ratio - 1 + log_ratio)
        terms += rng.normal(size=tokens) * np.arange(tokens)
        kept, chances = enumerated(design)
        assert chances @ (kept / design.probabilities @ terms) == pytest.approx(
            terms.sum(), rel=1e-12, abs=1e-12 * np.abs(terms).sum()
        )


ESTIMATORS = {
    "weights that sum to 1": lambda kept, weights, terms: kept.shape[1] * (weights @ terms) / weights.sum(1),
    "mean of what is kept": lambda kept, weights, terms: kept.shape[1] * (kept @ terms) / kept.sum(1),
    "no weights": lambda kept, weights, terms: kept @ terms,
}


@pytest.mark.parametrize(
    "scheme,estimator",
    [
        *itertools.product(("rpc", "rpc-uniform", "rpc-two-point"), ESTIMATORS),
        ("urs", "no weights"),
    ],
)
def test_other_estimators_are_biased(scheme: str, estimator: str) -> None:
    """On terms that grow along the row. (Single tokens that are all alike in p are no control for a mean of them.)"""
    terms = np.linspace(0.2, 3, 12)
    design = TokenSelection(scheme=scheme, min_prefix=2).design(12)
    kept, chances = enumerated(design)
    mean = chances @ ESTIMATORS[estimator](kept, kept / design.probabilities, terms)
    assert abs(mean / terms.sum() - 1) > 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_follow_the_design(scheme: str) -> None:
    """z below 4 for every pair of tokens (25 tests); those of another design are far off."""
    draws = 100_000
    design = TokenSelection(scheme=scheme, budget=0.6, min_prefix=1, floor=0.2).design(5)
    rng = np.random.default_rng(2)
    draw = design.kept if isinstance(design, Independent) else lambda rng: design.cut(rng.random())
    kept = np.array([draw(rng) for _ in range(draws)], dtype=float)

    def largest_z(other: Design) -> float:
        outcome, probability = enumerated(other)
        joint = outcome.T * probability @ outcome  # of two tokens together
        by_chance = (joint > 0) & (joint < 1)
        frequencies, chances = (kept.T @ kept / draws)[by_chance], joint[by_chance]
        return float(np.max(np.abs(frequencies - chances) / np.sqrt(chances * (1 - chances) / draws)))

    assert largest_z(design) < 4
    assert kept[:, 0].all()
    assert largest_z(TokenSelection(scheme=scheme, budget=0.8, floor=0.2).design(5)) > 10
