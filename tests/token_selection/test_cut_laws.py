"""What laws of cuts cost at 2048 tokens: lengths, weights and variances, computed without drawing."""

from __future__ import annotations

import numpy as np
import pytest

from dta_plugin.token_selection.designs import (
    Design,
    PrefixCut,
    expected_kept,
    floored_cut,
    two_point_cut,
    uniform_cut,
    variance,
)

LONG = 2048


def relative_to_sum(design: Design, values: np.ndarray) -> float:
    return variance(design, values) / float(values.sum()) ** 2


def systematic(design: PrefixCut, rows: int) -> float:
    """Relative variance of the mean of `rows` estimates, all values alike, whose cuts are evenly spaced: exact.

    The mean is a step function of the first number in [0, 1 / rows); its steps are the p_t modulo 1 / rows.
    """
    estimates = np.concatenate([[0.0], np.cumsum(1 / design.probabilities)]) / len(design.probabilities)
    steps = np.unique(np.concatenate([[0.0, 1 / rows], design.probabilities % (1 / rows)]))
    u = ((steps[1:] + steps[:-1]) / 2)[:, None] + np.arange(rows) / rows
    lengths = len(design.probabilities) - np.searchsorted(design.probabilities[::-1], u, side="right")
    means = estimates[lengths].mean(1)
    return float(((means - 1) ** 2 * np.diff(steps)).sum() * rows)


def share(floor: float) -> float:
    """The budget at which a floored cut falls down to the floor just behind the last token."""
    return floor + (1 - floor) * (LONG + 1) / (2 * LONG)


# E[L] / T, E[L^2] / T^2, E[longest of 8] / T, largest weight; variance: iid, coherent, of 8 by themselves, of 8 even
TABLE: dict[str, tuple[PrefixCut, tuple[float, ...]]] = {
    "uniform 1": (uniform_cut(LONG, 0.5, 1, 0.1), (0.5002, 0.3336, 0.8891, 2048, 7.2021, 0.996, 0.1245, 0.0373)),
    "uniform 64": (uniform_cut(LONG, 0.5, 64, 0.1), (0.5156, 0.3442, 0.8926, 1985, 6.9503, 0.9356, 0.1169, 0.035)),
    "uniform 256": (uniform_cut(LONG, 0.5, 256, 0.1), (0.5625, 0.3803, 0.903, 1793, 6.1889, 0.763, 0.0954, 0.0285)),
    "uniform 1024": (uniform_cut(LONG, 0.5, 1024, 0.1), (0.75, 0.5834, 0.9446, 1025, 3.2583, 0.2487, 0.0311, 0.0092)),
    "floor .1": (
        floored_cut(LONG, share(0.1), 1, 0.1),
        (0.5502, 0.4002, 0.9523, 9.9562, 1.5562, 0.6529, 0.0816, 0.0077),
    ),
    "floor .25": (
        floored_cut(LONG, share(0.25), 1, 0.25),
        (0.6252, 0.5002, 0.9889, 3.9941, 0.8477, 0.434, 0.0542, 0.0044),
    ),
    "two-point 64": (two_point_cut(LONG, 0.515625, 64, 0.1), (0.5156, 0.5005, 0.9962, 2, 0.9688, 0.9385, 0.1173, 0.0)),
    "two-point 512": (two_point_cut(LONG, 0.5, 512, 0.1), (0.5, 0.375, 0.9707, 3, 1.5, 1.125, 0.1406, 0.0176)),
}


@pytest.mark.parametrize("law", TABLE)
def test_what_laws_of_cuts_cost(law: str) -> None:
    """The figures by which a law is chosen."""
    design, expected = TABLE[law]
    p = design.probabilities
    t = np.arange(1, LONG + 1)
    coherent = relative_to_sum(design, np.ones(LONG))
    figures = (
        expected_kept(design) / LONG,
        float(((2 * t - 1) * p).sum()) / LONG**2,
        float((1 - (1 - p) ** 8).sum()) / LONG,
        float(1 / p.min()),
        float((1 / p - 1).mean()),
        coherent,
        coherent / 8,
        systematic(design, 8),
    )
    assert figures == pytest.approx(expected, rel=1e-5, abs=6e-5), figures


def test_even_cuts_are_one_cut_where_there_is_one_row() -> None:
    """`systematic` itself, for which the table has no formula."""
    for design, _ in TABLE.values():
        assert systematic(design, 1) == pytest.approx(relative_to_sum(design, np.ones(LONG)), rel=1e-6)
