"""The trajectory objective in an update: clipped ratios of a rollout's steps, sample by sample, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.diffusion.objectives.baselines import k3_terms, ratio_clipped, token_ratio_terms
from dta_plugin.diffusion.objectives.bgpo import rows_to_run
from dta_plugin.diffusion.objectives.elbo import length_scale
from dta_plugin.diffusion.objectives.trajectory import step_log_probs
from dta_plugin.diffusion.steps import StepDraws, draw_steps
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.statistics import Statistics
from dta_plugin.training.diffusion.update import MicroStep, Objective, Update


class TrajectoryObjective(Objective):
    """`objective` "trajectory", for batches with a rollout.

    epsilon: the clip range of a step's ratio. beta: weight of the k3 penalty of each step.
    """

    def draws(self, batch: DiffusionBatch) -> StepDraws:
        """The steps of these rows: the same whenever and beside whatever rows they are asked for."""
        assert batch.rollout is not None
        return draw_steps(batch.rollout.steps, batch.lengths, self.options.num_elbo_samples, batch.seeds)

    def log_probs(
        self, model: nn.Module, batch: DiffusionBatch, draws: StepDraws, sample: int, which: torch.Tensor
    ) -> torch.Tensor:
        """Log-probs [b] of the sample's step in these rows, on the canvas that the sampler saw."""
        assert batch.rollout is not None
        canvas = batch.rollout.canvas_ids
        ids = torch.cat([batch.input_ids[:, : -batch.width], canvas], dim=1)
        mask = torch.cat([batch.attention_mask[:, : -batch.width], torch.ones_like(canvas)], dim=1)
        with self.autocast():
            return step_log_probs(model, self.family, ids, mask, draws, sample, which, self.sharing)

    @torch.no_grad()
    def stored(self, model: nn.Module, batch: DiffusionBatch) -> torch.Tensor:
        """Log-probs [B, n] of the drawn steps under a policy that later ones are compared with."""
        draws = self.draws(batch)
        every = torch.arange(len(batch), device=batch.input_ids.device)
        return torch.stack([self.log_probs(model, batch, draws, sample, every) for sample in range(draws.samples)], 1)

    def update(self, model: nn.Module, step: MicroStep) -> TrajectoryUpdate:
        return TrajectoryUpdate(self, model, step)


class TrajectoryUpdate(Update):
    """A part of the loss per sample."""

    objective: TrajectoryObjective

    def __init__(self, objective: TrajectoryObjective, model: nn.Module, step: MicroStep) -> None:
        super().__init__(objective, model, step)
        self.draws = objective.draws(step.batch)
        self.has_step = self.draws.chosen >= 0  # [B, n]
        scale = length_scale(objective.options.length_norm, self.lengths, objective.max_length)
        self.weights = self.draws.weights * scale[:, None] / self.draws.samples
        self.seen = torch.zeros_like(self.draws.weights)

    def losses(self) -> Iterator[torch.Tensor]:
        step, objective = self.step, self.objective
        for sample in range(self.draws.samples):
            which = rows_to_run(self.counts & self.has_step[:, sample], step.always_run)
            if not len(which):
                continue
            new = objective.log_probs(self.model, step.batch, self.draws, sample, which)
            self._see(new, which, sample)
            old = new.detach() if step.old is None else step.old[which, sample]
            one = torch.ones_like(new, dtype=torch.bool)[:, None]  # a step is one decision, whatever it commits
            value = token_ratio_terms(new[:, None], old[:, None], self.advantages[which], one, objective.epsilon)
            if step.reference is not None:
                value = value - objective.beta * k3_terms(new[:, None], step.reference[which, sample, None], one)
            yield (value * self.weights[which, sample]).sum() * (-step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        step, objective = self.step, self.objective
        counts, new = self.counts[:, None] & self.has_step, self.seen
        old = new if step.old is None else step.old
        d = (new - old)[counts]
        found = self._common_statistics(d)
        tokens = [self.draws.mask(sample, counts[:, sample].nonzero()[:, 0]).sum() for sample in range(counts.shape[1])]
        found.means["log_prob"] = (new[counts].sum(), torch.stack(tokens).sum())
        hit = ratio_clipped(d, self.advantages[:, None].expand_as(counts)[counts], objective.epsilon)
        found.means["clip_fraction"] = (hit.sum(), hit.numel())
        if step.reference is not None:
            apart = (new - step.reference)[counts][:, None]
            kl = k3_terms(apart, torch.zeros_like(apart), torch.ones_like(apart, dtype=torch.bool))
            found.means["kl"] = (kl.sum(), len(kl))
        return found
