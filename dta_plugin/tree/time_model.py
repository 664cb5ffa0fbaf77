"""Seconds out of FLOPs: what a machine takes for the parts of a micro-batch, fitted to measurements.

    seconds = call * calls + linear * linear FLOPs + attention * attention FLOPs + head * LM-head FLOPs

Four numbers per way of running a model (as a tree, dense). FLOPs are those of the forward pass, seconds those of
forward and backward. The fit minimises squared relative errors over non-negative numbers, so that small batches count
as much as large ones and a cost is never negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from dta_plugin.errors import InvalidInputError


class Work(NamedTuple):
    """What a micro-batch asks for: calls of the model, and forward FLOPs of its parts."""

    calls: float
    linear: float
    attention: float
    head: float

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.head


@dataclass(frozen=True, slots=True)
class SecondsPerFlop:
    """Seconds, forward and backward together: per call of the model, and per forward FLOP of each of its parts."""

    call: float
    linear: float
    attention: float
    head: float

    def seconds(self, work: Work) -> float:
        return sum(rate * part for rate, part in zip(astuple(self), work, strict=True))

    @classmethod
    def fit(cls, work: Sequence[Work], seconds: Sequence[float]) -> SecondsPerFlop:
        """The rates whose predictions of `seconds` [N] for `work` [N] have the least squared relative error.

        Raises InvalidInputError for fewer than four measurements or one that is not positive.
        """
        measured = np.asarray(seconds, dtype=np.float64)
        if len(work) != len(measured) or len(measured) < 4 or not (measured > 0).all():
            raise InvalidInputError(
                f"Got {len(work)} batches with the times {list(seconds)}. Expected at least four, all above 0 s."
            )
        relative = np.array(work, dtype=np.float64) / measured[:, None]
        size = relative.max(axis=0)
        return cls(*(_non_negative(relative / np.where(size > 0, size, 1.0)) / np.where(size > 0, size, 1.0)).tolist())


def _non_negative(columns: np.ndarray) -> np.ndarray:
    """x [K] >= 0 that brings columns [N, K] @ x nearest to 1: least squares on every subset of so few columns."""
    count = columns.shape[1]
    best, least = np.zeros(count), float(len(columns))
    for chosen in (list(subset) for size in range(1, count + 1) for subset in combinations(range(count), size)):
        found, *_ = np.linalg.lstsq(columns[:, chosen], np.ones(len(columns)), rcond=None)
        error = float(((columns[:, chosen] @ found - 1.0) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(count), error
            best[chosen] = found
    return best
