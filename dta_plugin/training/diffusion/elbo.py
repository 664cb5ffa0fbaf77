"""The objectives on ELBO terms in an update: the bound of BGPO, sample by sample, and what it bounds (vrpo)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.diffusion import MaskDraws, draw_masks
from dta_plugin.diffusion.objectives.baselines import sampled_elbo_ratio
from dta_plugin.diffusion.objectives.bgpo import bound_gap, clipped, k2_terms, per_sample_losses, rows_to_run
from dta_plugin.diffusion.objectives.elbo import length_scale, sample_term
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.statistics import SHARES, Statistics, mask_histogram
from dta_plugin.training.diffusion.update import MicroStep, Objective, Update


class ElboObjective(Objective):
    """On the ELBO terms of each sample."""

    def draws(self, batch: DiffusionBatch) -> MaskDraws:
        """The noise of these rows: the same whenever and beside whatever rows it is asked for."""
        own = self.options
        return draw_masks(
            batch.lengths, own.num_elbo_samples, batch.seeds, own.mask_form, own.stratified_masks, own.coupled_masks
        )

    def term(
        self, model: nn.Module, batch: DiffusionBatch, draws: MaskDraws, sample: int, which: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ELBO terms [b] of one sample of these rows (None: all)."""
        with self.autocast():
            return sample_term(
                model,
                self.family,
                batch.input_ids,
                batch.attention_mask,
                draws,
                sample,
                batch.width,
                which,
                self.sharing,
            )

    @torch.no_grad()
    def stored(self, model: nn.Module, batch: DiffusionBatch) -> torch.Tensor:
        """ELBO terms [B, n] of a policy that later ones are compared with."""
        draws = self.draws(batch)
        return torch.stack([self.term(model, batch, draws, sample) for sample in range(draws.samples)], dim=1)


class BgpoObjective(ElboObjective):
    """`objective` "bgpo". beta: weight of the k2 penalty of each sample."""

    def update(self, model: nn.Module, step: MicroStep) -> Update:
        return BgpoUpdate(self, model, step)


class VrpoObjective(ElboObjective):
    """`objective` "vrpo". beta: weight of the k2 penalty of the ELBO."""

    passes = 1

    def update(self, model: nn.Module, step: MicroStep) -> Update:
        return VrpoUpdate(self, model, step)


class ElboUpdate(Update):
    """What the bound and what it bounds have in common."""

    objective: ElboObjective

    def __init__(self, objective: ElboObjective, model: nn.Module, step: MicroStep) -> None:
        super().__init__(objective, model, step)
        self.draws = objective.draws(step.batch)
        self.scale = length_scale(objective.options.length_norm, self.lengths, objective.max_length)
        self.seen = torch.zeros_like(self.draws.weights)

    def _term(self, sample: int, which: torch.Tensor) -> torch.Tensor:
        values = self.objective.term(self.model, self.step.batch, self.draws, sample, which)
        self._see(values, which, sample)
        return values

    def _d(self, other: torch.Tensor | None) -> torch.Tensor:
        """Scaled differences [b, n] of the rows that count from another policy's terms; from their own for None."""
        new = self.seen[self.counts]
        return (new - (new if other is None else other[self.counts])) * self.scale[self.counts, None]

    def statistics(self) -> Statistics:
        found = self._common_statistics(self._d(self.step.old))
        elbo = self.seen[self.counts].mean(dim=1)
        found.means["elbo"] = (elbo.sum(), self.lengths[self.counts].sum())
        if self.step.reference is not None:
            apart = self._d(self.step.reference)
            found.means["kl"] = (k2_terms(apart).sum(), apart.numel())
        found.means |= mask_histogram(self.draws.histogram(SHARES))
        return found


class BgpoUpdate(ElboUpdate):
    """A part of the loss per sample."""

    def losses(self) -> Iterator[torch.Tensor]:
        options, step = self.objective.options, self.step
        parts = per_sample_losses(
            self._term,
            self.advantages,
            options.num_elbo_samples,
            old_terms=step.old,
            length_scale=self.scale,
            loss_scale=step.scale,
            clip=options.bound_clip,
            dual_clip=options.dual_clip,
            reference_terms=step.reference,
            beta=self.objective.beta,
            always_run=step.always_run,
        )
        for part in parts:
            yield part.loss

    def statistics(self) -> Statistics:
        found, clips = super().statistics(), (self.objective.options.bound_clip, self.objective.options.dual_clip)
        d, advantages = self._d(self.step.old), self.advantages[self.counts]
        found.means["bound_gap"] = (bound_gap(d, advantages).sum(), len(d))
        if any(clip is not None for clip in clips):
            hit = clipped(d, advantages[:, None], *clips)
            found.means["clip_fraction"] = (hit.sum(), hit.numel())
        return found


class VrpoUpdate(ElboUpdate):
    """One loss, of all samples in one graph."""

    def losses(self) -> Iterator[torch.Tensor]:
        step = self.step
        which = rows_to_run(self.counts, step.always_run)
        if not len(which):
            return
        new = torch.stack([self._term(sample, which) for sample in range(self.draws.samples)], dim=1)
        old = new.detach() if step.old is None else step.old[which]
        scale = self.scale[which, None]
        value = sampled_elbo_ratio((new - old) * scale, self.advantages[which])
        if step.reference is not None:
            value = value - self.objective.beta * k2_terms(((new - step.reference[which]) * scale).mean(dim=1))
        yield value.sum() * (-step.scale / len(self.advantages))
