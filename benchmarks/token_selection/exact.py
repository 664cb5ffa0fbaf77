"""Exact variance over drawings of a weighted sum of gradients, for cuts, single tokens, and any row law by enumeration.

A row's gradients are float64 [T, R], token by token, in any coordinates whose inner products are theirs. No drawing is
sampled: cuts are step functions of the number they are made of, which are integrated between their steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.token_selection.designs import PrefixCut


def cut_moments(designs: Sequence[PrefixCut], rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """(own, cross) of a group: variances of its rows' sums, added up; covariances of rows that are cut together.

    Drawn apart, the group's sum varies by `own`, spread evenly over siblings (`token_sharing=group`) by own + cross.
    """
    group = len(rows)
    starts, widths = _intervals(designs, group)
    offsets = np.arange(group)[:, None] / group
    sums = []
    for design, row in zip(designs, rows, strict=True):
        cumulative = np.concatenate([np.zeros((1, row.shape[1])), np.cumsum(row / design.probabilities[:, None], 0)])
        kept = len(row) - np.searchsorted(design.probabilities[::-1], offsets + starts + widths / 2, side="right")
        sums.append(cumulative[kept] - row.sum(0))  # [G, intervals, R], 0 on average
    own = sum(float(np.einsum("gir,i->", each**2, widths)) for each in sums)
    # Different rows at different places of the grid: all pairs, less those of one row, less those of one place.
    over_places = [each.sum(0) for each in sums]
    pairs = np.square(sum(over_places)) - sum(np.square(each) for each in over_places)
    alike = np.square(sum(sums)) - sum(np.square(each) for each in sums)
    both = np.einsum("ir,i->", pairs, widths) - np.einsum("gir,i->", alike, widths)
    return own, float(both) / max(group - 1, 1)


def _intervals(designs: Sequence[PrefixCut], group: int) -> tuple[np.ndarray, np.ndarray]:
    """Where [0, 1 / group) is cut, so that no row changes its length within: starts and widths."""
    steps = np.concatenate([design.probabilities for design in designs]) % (1 / group)
    edges = np.unique(np.concatenate([[0.0, 1 / group], steps]))
    return edges[:-1], np.diff(edges)


def single_variance(probabilities: np.ndarray, row: np.ndarray) -> float:
    """Of single tokens, each drawn by itself."""
    return float((1 / probabilities - 1) @ np.square(row).sum(1))


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """All drawings of one row. kept: bool [O, T]. chances: [O], sum 1. A drawing runs up to its last kept token."""

    kept: np.ndarray
    chances: np.ndarray

    @property
    def run(self) -> np.ndarray:
        """int [O]: tokens that run."""
        return np.where(self.kept, np.arange(1, self.kept.shape[1] + 1), 0).max(1)

    def weights(self) -> np.ndarray:
        """[O, T]: one over the probability where a token is kept."""
        return self.kept / (self.chances @ self.kept)

    def weights_given_run(self) -> np.ndarray:
        """The mean of the weights over all drawings that run as far: also 1 on average, and nowhere more variance."""
        weights, run = self.weights(), self.run
        for length in np.unique(run):
            same = run == length
            weights[same] = self.chances[same] @ weights[same] / self.chances[same].sum()
        return weights

    def variance(self, weights: np.ndarray, alike: bool) -> float:
        """Relative variance of a row's sum, its tokens' gradients alike, or unrelated and alike in size."""
        tokens = weights.shape[1]
        if alike:
            return float(self.chances @ (weights.mean(1) - 1) ** 2)
        return float(self.chances @ (weights**2).sum(1)) / tokens - 1


def prefixes(probabilities: np.ndarray) -> Outcomes:
    falls = -np.diff([*probabilities, 0.0])
    lengths = np.flatnonzero(falls > 0) + 1
    return Outcomes(np.arange(len(probabilities)) < lengths[:, None], falls[falls > 0])


def thinned(cuts: Outcomes, share: float) -> Outcomes:
    """Single tokens of a random prefix, the first one always: up to 2^(T-1) drawings per prefix."""
    kept, chances = [], []
    for prefix, chance in zip(cuts.kept, cuts.chances, strict=True):
        rest = int(prefix.sum()) - 1
        for bits in itertools.product((True, False), repeat=rest):
            kept.append(np.concatenate([[True], bits, np.zeros(len(prefix) - 1 - rest, dtype=bool)]).astype(bool))
            chances.append(chance * share ** sum(bits) * (1 - share) ** (rest - sum(bits)))
    return Outcomes(np.array(kept), np.array(chances))


def with_segment(cuts: Outcomes, share: float, length: int) -> Outcomes:
    """A random prefix, and with the chance `share` so many tokens in a row anywhere behind it."""
    kept, chances = [], []
    for prefix, chance in zip(cuts.kept, cuts.chances, strict=True):
        end, tokens = int(prefix.sum()), len(prefix)
        starts = range(end, max(tokens - length, end) + 1) if end < tokens else range(0)
        kept.append(prefix)
        chances.append(chance * (1 - share if len(starts) else 1.0))
        for start in starts:
            segment = prefix.copy()
            segment[start : start + length] = True
            kept.append(segment)
            chances.append(chance * share / len(starts))
    return Outcomes(np.array(kept), np.array(chances))
