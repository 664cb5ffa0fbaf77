"""Every outcome of a small sampling design, and every drawing of a small batch, with its probability.

A mean over them is exact: `sum(p * f(drawn) for drawn, p in drawings(...))` is the expectation of f.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from dta_plugin.token_selection.designs import Design, Independent
from dta_plugin.token_selection.select import Drawn, TokenSelection


def outcomes(design: Design) -> Iterator[tuple[np.ndarray, float]]:
    """Yields (kept, probability), kept: bool [T], for every outcome that can happen; the probabilities sum to 1.

    Up to 2^T for Independent, at most T cuts for PrefixCut.
    """
    if isinstance(design, Independent):
        yield from _subsets(design.probabilities)
    else:
        yield from _cuts(design.probabilities)


def drawings(selection: TokenSelection, carries_loss: np.ndarray) -> Iterator[tuple[Drawn, float]]:
    """Yields (drawn, probability) for every `Drawn` that `draw` can return for bool [B, C], each row by itself.

    Their number is the product of the rows' numbers of outcomes: at most T^B for cuts of rows of T tokens, and 2^(TB)
    for single tokens. Drawings of equal weights (cuts between which no token carries loss) come once.
    """
    rows = [_row_weights(selection, carries) for carries in carries_loss]
    probabilities = np.stack([_row_probabilities(selection, carries) for carries in carries_loss])
    for combination in itertools.product(*rows):
        weights = np.stack([weights for weights, _ in combination])
        yield (
            Drawn(weights, probabilities, carries_loss, (0, 0, 0)),
            math.prod(probability for _, probability in combination),
        )


def _row_probabilities(selection: TokenSelection, carries: np.ndarray) -> np.ndarray:
    """p at the tokens that carry loss, 1 at all others."""
    probabilities = np.ones(len(carries))
    positions = _positions(selection, carries)
    if len(positions):
        probabilities[positions] = selection.design(len(positions)).probabilities
    return np.where(carries, probabilities, 1.0)


def _positions(selection: TokenSelection, carries: np.ndarray) -> np.ndarray:
    """What a row's design is over: tokens with loss, or all up to the last one of them for cuts."""
    positions = carries.nonzero()[0]
    return np.arange(positions.max() + 1) if selection.cuts and len(positions) else positions


def _row_weights(selection: TokenSelection, carries: np.ndarray) -> list[tuple[np.ndarray, float]]:
    if not carries.any():
        return [(np.zeros(len(carries)), 1.0)]
    positions = _positions(selection, carries)
    design = selection.design(len(positions))
    probability_of: dict[bytes, float] = {}
    for kept, probability in outcomes(design):
        weights = np.zeros(len(carries))
        weights[positions[kept]] = 1 / design.probabilities[kept]
        key = (weights * carries).tobytes()
        probability_of[key] = probability_of.get(key, 0.0) + probability
    return [(np.frombuffer(key), probability) for key, probability in probability_of.items()]


def _subsets(probabilities: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    choices = [[kept for kept in (True, False) if (p if kept else 1 - p) > 0] for p in probabilities]
    for chosen in itertools.product(*choices):
        kept = np.array(chosen, dtype=bool)
        yield kept, float(np.where(kept, probabilities, 1 - probabilities).prod())


def _cuts(probabilities: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """A prefix of L tokens has the probability p_L - p_(L+1), where p_0 = 1 and p_(T+1) = 0."""
    falls = -np.diff([1.0, *probabilities, 0.0])
    for length in np.flatnonzero(falls > 0):
        yield np.arange(len(probabilities)) < length, float(falls[length])
