"""GDSD in an update: squared distances of log-ratios from advantages, sample by sample, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dta_plugin.diffusion import MaskDraws
from dta_plugin.diffusion.objectives.bgpo import check_terms, k2_terms, rows_to_run
from dta_plugin.diffusion.objectives.gdsd import clamp_range, clamped, distance_terms
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.elbo import ElboObjective
from dta_plugin.training.diffusion.statistics import SHARES, Statistics, mask_histogram
from dta_plugin.training.diffusion.update import MicroStep, Update


class GdsdObjective(ElboObjective):
    """`objective` "gdsd": the noise of an ELBO, its terms unweighted.

    max_length: W, of the canvas. epsilon: of the clamp. beta: weight of the k2 penalty.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        clamp_range(self.epsilon)

    def term(
        self, model: nn.Module, batch: DiffusionBatch, draws: MaskDraws, sample: int, which: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums [b] of the masked log-probs of one sample of these rows (None: all)."""
        return super().term(model, batch, replace(draws, weights=torch.ones_like(draws.weights)), sample, which)

    def update(self, model: nn.Module, step: MicroStep) -> GdsdUpdate:
        return GdsdUpdate(self, model, step)


class GdsdUpdate(Update):
    """A part of the loss per sample."""

    objective: GdsdObjective

    def __init__(self, objective: GdsdObjective, model: nn.Module, step: MicroStep) -> None:
        super().__init__(objective, model, step)
        self.draws = objective.draws(step.batch)
        check_terms("old_terms", step.old, len(step.batch), self.draws.samples)
        check_terms("reference_terms", step.reference, len(step.batch), self.draws.samples)
        # Away from the old policy a row without advantage is drawn back to it; there, its gradient is 0.
        is_held = step.old is not None or step.reference is not None
        self.counts = self.lengths > 0 if is_held else self.advantages != 0
        self.seen = torch.zeros_like(self.draws.weights)

    def losses(self) -> Iterator[torch.Tensor]:
        step, objective = self.step, self.objective
        which = rows_to_run(self.counts, step.always_run)
        if not len(which):
            return
        advantages, width = self.advantages[which], objective.max_length
        for sample in range(self.draws.samples):
            new = objective.term(self.model, step.batch, self.draws, sample, which)
            self._see(new, which, sample)
            old = new.detach() if step.old is None else step.old[which, sample].to(new.dtype)
            scale, epsilon = objective.options.advantage_scale, objective.epsilon
            value = distance_terms(new - old, advantages, self.draws.samples, width, scale, epsilon)
            if step.reference is not None:
                apart = (new - step.reference[which, sample].to(new.dtype)) / width
                value = value + objective.beta / self.draws.samples * k2_terms(apart)
            yield value.sum() * (step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        step, objective, ran = self.step, self.objective, self.counts
        new = self.seen[ran]
        d = new - (new if step.old is None else step.old[ran].to(new.dtype))
        found = self._common_statistics(d / objective.max_length)
        found.means["elbo"] = ((new * self.draws.weights[ran]).mean(dim=1).sum(), self.lengths[ran].sum())
        found.means["clip_fraction"] = (clamped(d, objective.epsilon).sum(), d.numel())
        if step.reference is not None:
            apart = (new - step.reference[ran].to(new.dtype)) / objective.max_length
            found.means["kl"] = (k2_terms(apart).sum(), apart.numel())
        found.means |= mask_histogram(self.draws.histogram(SHARES))
        return found
