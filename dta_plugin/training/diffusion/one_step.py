"""diffu-grpo in an update: token ratios from one forward in which every completion token is hidden (arXiv 2504.12216).

Every pass over a generation batch hides other prompt tokens, the same for the old and for the new policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.diffusion import prompt_noise
from dta_plugin.diffusion.objectives.baselines import k3_terms, ratio_clipped, token_ratio_terms
from dta_plugin.diffusion.objectives.bgpo import rows_to_run
from dta_plugin.diffusion.objectives.elbo import masked_log_probs
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.statistics import Statistics
from dta_plugin.training.diffusion.update import MicroStep, Objective, Update


class OneStepObjective(Objective):
    """`objective` "diffu-grpo". beta: weight of the k3 penalty."""

    passes = 1

    def log_probs(
        self, model: nn.Module, batch: DiffusionBatch, iteration: int, which: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probs [b, C] of the completion tokens of these rows (None: all), 0 at padding."""
        prompts = batch.attention_mask[:, : -batch.width]
        noise = prompt_noise(prompts, batch.seeds, self.options.prompt_mask_probability, iteration)
        chosen = slice(None) if which is None else which
        mask = batch.attention_mask[chosen]
        with self.autocast():
            return masked_log_probs(
                model,
                self.family,
                batch.input_ids[chosen],
                mask,
                mask[:, -batch.width :].bool(),
                prompt_mask=noise[chosen],
                sharing=self.sharing,
            )

    @torch.no_grad()
    def stored(self, model: nn.Module, batch: DiffusionBatch) -> torch.Tensor:
        """Log-probs [B, iterations, C] of a policy that later ones are compared with."""
        passes = range(self.iterations)
        return torch.stack([self.log_probs(model, batch, iteration) for iteration in passes], dim=1)

    def update(self, model: nn.Module, step: MicroStep) -> OneStepUpdate:
        return OneStepUpdate(self, model, step)


class OneStepUpdate(Update):
    """One loss."""

    objective: OneStepObjective

    def __init__(self, objective: OneStepObjective, model: nn.Module, step: MicroStep) -> None:
        super().__init__(objective, model, step)
        self.scored = step.batch.attention_mask[:, -step.batch.width :].bool()
        self.seen = torch.zeros_like(self.scored, dtype=torch.float32)

    def losses(self) -> Iterator[torch.Tensor]:
        step, objective = self.step, self.objective
        which = rows_to_run(self.counts, step.always_run)
        if not len(which):
            return
        new = objective.log_probs(self.model, step.batch, step.iteration, which)
        self._see(new, which)
        scored = self.scored[which]
        old = new.detach() if step.old is None else step.old[which, step.iteration]
        value = token_ratio_terms(new, old, self.advantages[which], scored, objective.epsilon)
        if step.reference is not None:
            value = value - objective.beta * k3_terms(new, step.reference[which, step.iteration], scored)
        yield value.sum() * (-step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        step, objective = self.step, self.objective
        scored, new = self.scored & self.counts[:, None], self.seen
        old = new if step.old is None else step.old[:, step.iteration]
        d = (new - old)[scored]
        found = self._common_statistics(d)
        found.means["log_prob"] = (new[scored].sum(), scored.sum())
        hit = ratio_clipped(d, self.advantages[:, None].expand_as(scored)[scored], objective.epsilon)
        found.means["clip_fraction"] = (hit.sum(), hit.numel())
        if step.reference is not None:
            kl = k3_terms(new, step.reference[:, step.iteration], scored)
            found.means["kl"] = (kl.sum(), self.counts.sum())
        return found
