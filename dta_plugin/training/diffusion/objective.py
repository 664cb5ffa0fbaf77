"""The objectives on ELBO terms in an update: the bound of BGPO, sample by sample, and what it bounds (vrpo)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.diffusion import DiffusionFamily, MaskDraws, draw_masks
from dta_plugin.diffusion.objectives.baselines import sampled_elbo_ratio
from dta_plugin.diffusion.objectives.bgpo import bound_gap, clipped, k2_terms, per_sample_losses, rows_to_run
from dta_plugin.diffusion.objectives.elbo import length_scale, sample_term
from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import SHARES, Statistics, mask_histogram, run_statistics
from dta_plugin.training.diffusion.update import Autocast, MicroStep, Update


class ElboObjective:
    """`objective` "bgpo" or "vrpo". max_length: of completions, for `length_norm`. beta: weight of the k2 penalty."""

    def __init__(
        self,
        options: DiffusionOptions,
        family: DiffusionFamily,
        autocast: Autocast,
        max_length: int,
        beta: float = 0.0,
    ) -> None:
        self.options = options
        self.family = family
        self.autocast = autocast
        self.max_length = max_length
        self.beta = beta
        self.sharing = PromptSharing(options.share_prompts)
        self.passes = 1 if options.objective == "vrpo" else options.num_elbo_samples

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

    def update(self, model: nn.Module, step: MicroStep) -> Update:
        return ElboUpdate(self, model, step)


class ElboUpdate:
    """One micro-step. `losses` first, then `statistics` of what they have seen."""

    def __init__(self, objective: ElboObjective, model: nn.Module, step: MicroStep) -> None:
        self.objective, self.model, self.step = objective, model, step
        objective.sharing.restart()
        self.draws = objective.draws(step.batch)
        self.lengths = step.batch.lengths
        self.advantages = step.advantages.masked_fill(self.lengths == 0, 0.0)
        self.scale = length_scale(objective.options.length_norm, self.lengths, objective.max_length)
        self.seen: list[torch.Tensor] = []  # per sample, the terms [B], 0 in rows that did not run

    def losses(self) -> Iterator[torch.Tensor]:
        """The parts of the loss, each to be back-propagated before the next is asked for."""
        options, step = self.objective.options, self.step
        if options.objective == "vrpo":
            yield from self._in_one_graph()
            return
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

    def _term(self, sample: int, which: torch.Tensor) -> torch.Tensor:
        values = self.objective.term(self.model, self.step.batch, self.draws, sample, which)
        self.seen.append(values.detach().new_zeros(len(self.advantages)).index_put((which,), values.detach()))
        return values

    def _in_one_graph(self) -> Iterator[torch.Tensor]:
        step = self.step
        which = rows_to_run(self.advantages, step.reference is not None, step.always_run)
        if not len(which):
            return
        new = torch.stack([self._term(sample, which) for sample in range(self.draws.samples)], dim=1)
        old = new.detach() if step.old is None else step.old[which]
        scale = self.scale[which, None]
        value = sampled_elbo_ratio((new - old) * scale, self.advantages[which])
        if step.reference is not None:
            value = value - self.objective.beta * k2_terms(((new - step.reference[which]) * scale).mean(dim=1))
        yield value.sum() * (-step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        """Of the rows that count; a row that runs only because other ranks wait does not."""
        objective, step = self.objective, self.step
        options = objective.options
        ran = torch.zeros_like(self.advantages, dtype=torch.bool)
        ran[rows_to_run(self.advantages, step.reference is not None, always_run=False)] = True
        new = torch.stack(self.seen, dim=1)[ran] if self.seen else torch.zeros_like(self.draws.weights)[ran]
        old = new if step.old is None else step.old[ran]
        scale, advantages = self.scale[ran, None], self.advantages[ran]
        d = (new - old) * scale
        found = run_statistics(ran, self.lengths, d)
        found.means["elbo"] = (new.mean(dim=1).sum(), self.lengths[ran].sum())
        if options.objective == "bgpo":
            found.means["bound_gap"] = (bound_gap(d, advantages).sum(), len(d))
        if options.bound_clip is not None or options.dual_clip is not None:
            hit = clipped(d, advantages[:, None], options.bound_clip, options.dual_clip)
            found.means["clip_fraction"] = (hit.sum(), hit.numel())
        if step.reference is not None:
            apart = (new - step.reference[ran]) * scale
            found.means["kl"] = (k2_terms(apart).sum(), apart.numel())
        found.means |= mask_histogram(self.draws.histogram(SHARES))
        found.sums |= objective.sharing.counts(objective.family)
        return found
