"""GDSD in an update: squared distances of log-ratios from advantages, sample by sample, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dta_plugin.diffusion import DiffusionFamily, MaskDraws
from dta_plugin.diffusion.objectives.bgpo import check_terms, k2_terms, rows_to_run
from dta_plugin.diffusion.objectives.gdsd import clamp_range, clamped, distance_terms
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.objective import ElboObjective
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import SHARES, Statistics, mask_histogram, run_statistics
from dta_plugin.training.diffusion.update import Autocast, MicroStep


class GdsdObjective(ElboObjective):
    """`objective` "gdsd": the noise of an ELBO, its terms unweighted.

    max_length: W, of the canvas. epsilon: of the clamp. beta: weight of the k2 penalty.
    """

    def __init__(
        self,
        options: DiffusionOptions,
        family: DiffusionFamily,
        autocast: Autocast,
        max_length: int,
        epsilon: float,
        beta: float = 0.0,
    ) -> None:
        super().__init__(options, family, autocast, max_length, beta)
        clamp_range(epsilon)
        self.epsilon = epsilon

    def term(
        self, model: nn.Module, batch: DiffusionBatch, draws: MaskDraws, sample: int, which: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums [b] of the masked log-probs of one sample of these rows (None: all)."""
        return super().term(model, batch, replace(draws, weights=torch.ones_like(draws.weights)), sample, which)

    def update(self, model: nn.Module, step: MicroStep) -> GdsdUpdate:
        return GdsdUpdate(self, model, step)


class GdsdUpdate:
    """One micro-step. `losses` first, then `statistics` of what they have seen."""

    def __init__(self, objective: GdsdObjective, model: nn.Module, step: MicroStep) -> None:
        self.objective, self.model, self.step = objective, model, step
        objective.sharing.restart()
        self.draws = objective.draws(step.batch)
        check_terms("old_terms", step.old, len(step.batch), self.draws.samples)
        check_terms("reference_terms", step.reference, len(step.batch), self.draws.samples)
        self.lengths = step.batch.lengths
        self.advantages = step.advantages.masked_fill(self.lengths == 0, 0.0)
        # Away from the old policy a row without advantage is drawn back to it; there, its gradient is 0.
        is_held = step.old is not None or step.reference is not None
        self.counts = self.lengths > 0 if is_held else self.advantages != 0
        self.seen = torch.zeros_like(self.draws.weights)  # [B, n] terms, 0 where a row did not run

    def losses(self) -> Iterator[torch.Tensor]:
        """The parts of the loss, one per sample, each to be back-propagated before the next is asked for."""
        step, objective = self.step, self.objective
        which = rows_to_run(self.counts.to(self.advantages.dtype), False, step.always_run)
        if not len(which):
            return
        advantages, width = self.advantages[which], objective.max_length
        for sample in range(self.draws.samples):
            new = objective.term(self.model, step.batch, self.draws, sample, which)
            self.seen = self.seen.to(new.dtype).index_put((which, torch.full_like(which, sample)), new.detach())
            old = new.detach() if step.old is None else step.old[which, sample].to(new.dtype)
            scale, epsilon = objective.options.advantage_scale, objective.epsilon
            value = distance_terms(new - old, advantages, self.draws.samples, width, scale, epsilon)
            if step.reference is not None:
                apart = (new - step.reference[which, sample].to(new.dtype)) / width
                value = value + objective.beta / self.draws.samples * k2_terms(apart)
            yield value.sum() * (step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        """Of the rows that count; a row that runs only because other ranks wait does not."""
        step, objective, ran = self.step, self.objective, self.counts
        new = self.seen[ran]
        d = new - (new if step.old is None else step.old[ran].to(new.dtype))
        found = run_statistics(ran, self.lengths, d / objective.max_length)
        found.means["elbo"] = ((new * self.draws.weights[ran]).mean(dim=1).sum(), self.lengths[ran].sum())
        found.means["clip_fraction"] = (clamped(d, objective.epsilon).sum(), d.numel())
        if step.reference is not None:
            apart = (new - step.reference[ran].to(new.dtype)) / objective.max_length
            found.means["kl"] = (k2_terms(apart).sum(), apart.numel())
        found.means |= mask_histogram(self.draws.histogram(SHARES))
        found.sums |= objective.sharing.counts(objective.family)
        return found
