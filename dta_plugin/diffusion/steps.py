"""Which steps of a rollout each Monte-Carlo sample scores: seeds are kept, steps are drawn on demand.

A rollout commits tokens step by step. A sample is one of its steps: hidden is what was still masked then, scored what
the step committed. A row's steps are drawn without replacement, from its own seed alone, as masks are (`masks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError


@dataclass(frozen=True, slots=True, eq=False)
class StepDraws:
    """Steps of B rollouts in n samples each. Make one with `draw_steps`.

    steps: int64 [B, C], the step that committed each token; -1 where none did. scored: bool [B, C], tokens that count.
    chosen: int64 [B, n], a sample's step; -1 where a row has no more steps.
    weights: float32 [B, n], 0 there.
    """

    steps: torch.Tensor
    scored: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    @property
    def samples(self) -> int:
        return self.chosen.shape[1]

    def mask(self, sample: int, rows: torch.Tensor) -> torch.Tensor:
        """bool [b, C]: the tokens that count which the sample's step committed. rows: int64 [b]."""
        return self.scored[rows] & (self.steps[rows] == self.chosen[rows, sample, None])

    def waiting(self, sample: int, rows: torch.Tensor) -> torch.Tensor:
        """bool [b, C]: what was still masked when the sample's step began, what it committed included."""
        steps = self.steps[rows]
        return (steps < 0) | (steps >= self.chosen[rows, sample, None])


def draw_steps(steps: torch.Tensor, lengths: torch.Tensor, samples: int, seeds: torch.Tensor) -> StepDraws:
    """`samples` steps of every rollout, among those that committed one of the first `lengths` tokens.

    steps: int64 [B, C], as in `SampledCompletions`. lengths: int64 [B] tokens of each completion that count; a row of
    length 0 has no steps. seeds: int64 [B], at least 0.

    Weights are such that the mean over samples of weight times f(step) is an unbiased estimate of the sum of f over a
    row's S steps: S, each step as likely as another; where there are at least S samples every step is there once and
    the mean is that sum. Raises InvalidInputError for other shapes, signs and dtypes.
    """
    _check(steps, lengths, samples, seeds)
    scored = (torch.arange(steps.shape[1], device=steps.device) < lengths[:, None]) & (steps >= 0)
    chosen = np.full((len(steps), samples), -1, dtype=np.int64)
    weights = np.zeros((len(steps), samples), dtype=np.float32)
    rows = zip(steps.cpu().numpy(), scored.cpu().numpy(), seeds.cpu().numpy(), strict=True)
    for row, (own, counts, seed) in enumerate(rows):
        drawn = np.random.default_rng(int(seed)).permutation(np.unique(own[counts]))
        kept = min(len(drawn), samples)
        chosen[row, :kept] = drawn[:kept]
        weights[row, :kept] = max(len(drawn), samples)
    return StepDraws(
        steps, scored, torch.from_numpy(chosen).to(steps.device), torch.from_numpy(weights).to(steps.device)
    )


def _check(steps: torch.Tensor, lengths: torch.Tensor, samples: int, seeds: torch.Tensor) -> None:
    if samples < 1:
        raise InvalidInputError(f"samples={samples}. Expected at least 1.")
    if steps.ndim != 2 or not lengths.shape == seeds.shape == steps.shape[:1]:
        raise InvalidInputError(
            f"steps {tuple(steps.shape)}, lengths {tuple(lengths.shape)}, seeds {tuple(seeds.shape)}. Expected [B, C], "
            "[B] and [B]."
        )
    if any(given.is_floating_point() for given in (steps, lengths, seeds)):
        raise InvalidInputError(f"Got {steps.dtype}, {lengths.dtype}, {seeds.dtype}. Expected integers.")
    if seeds.numel() and min(int(lengths.min()), int(seeds.min())) < 0:
        raise InvalidInputError(
            f"Lengths from {int(lengths.min())} and seeds from {int(seeds.min())}. Expected values of at least 0."
        )
