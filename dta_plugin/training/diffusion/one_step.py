"""diffu-grpo in an update: token ratios from one forward in which every completion token is hidden (arXiv 2504.12216).

Every pass over a generation batch hides other prompt tokens, the same for the old and for the new policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.diffusion import DiffusionFamily, prompt_noise
from dta_plugin.diffusion.objectives.baselines import k3_terms, ratio_clipped, token_ratio_terms
from dta_plugin.diffusion.objectives.bgpo import rows_to_run
from dta_plugin.diffusion.objectives.elbo import masked_log_probs
from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import Statistics, run_statistics
from dta_plugin.training.diffusion.update import Autocast, MicroStep


class OneStepObjective:
    """`objective` "diffu-grpo". epsilon: the clip range. iterations: passes over a generation batch.

    beta: weight of the k3 penalty.
    """

    passes = 1

    def __init__(
        self,
        options: DiffusionOptions,
        family: DiffusionFamily,
        autocast: Autocast,
        epsilon: float,
        iterations: int = 1,
        beta: float = 0.0,
    ) -> None:
        self.options = options
        self.family = family
        self.autocast = autocast
        self.epsilon = epsilon
        self.iterations = iterations
        self.beta = beta
        self.sharing = PromptSharing(options.share_prompts)

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


class OneStepUpdate:
    """One micro-step. `losses` first, then `statistics` of what they have seen."""

    def __init__(self, objective: OneStepObjective, model: nn.Module, step: MicroStep) -> None:
        self.objective, self.model, self.step = objective, model, step
        objective.sharing.restart()
        self.scored = step.batch.attention_mask[:, -step.batch.width :].bool()
        self.advantages = step.advantages.masked_fill(~self.scored.any(dim=1), 0.0)
        self.seen: torch.Tensor | None = None

    def losses(self) -> Iterator[torch.Tensor]:
        """The loss, where any row is to run."""
        step, objective = self.step, self.objective
        which = rows_to_run(self.advantages, step.reference is not None, step.always_run)
        if not len(which):
            return
        new = objective.log_probs(self.model, step.batch, step.iteration, which)
        self.seen = new.detach().new_zeros(self.scored.shape).index_put((which,), new.detach())
        scored = self.scored[which]
        old = new.detach() if step.old is None else step.old[which, step.iteration]
        value = token_ratio_terms(new, old, self.advantages[which], scored, objective.epsilon)
        if step.reference is not None:
            value = value - objective.beta * k3_terms(new, step.reference[which, step.iteration], scored)
        yield value.sum() * (-step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        """Of the rows that count; a row that runs only because other ranks wait does not."""
        step, objective = self.step, self.objective
        ran = torch.zeros_like(self.advantages, dtype=torch.bool)
        ran[rows_to_run(self.advantages, step.reference is not None, always_run=False)] = True
        scored = self.scored & ran[:, None]
        new = self.scored.float() if self.seen is None else self.seen
        old = new if step.old is None else step.old[:, step.iteration]
        d = (new - old)[scored]
        found = run_statistics(ran, self.scored.sum(dim=1), d)
        found.means["log_prob"] = (new[scored].sum(), scored.sum())
        hit = ratio_clipped(d, self.advantages[:, None].expand_as(scored)[scored], objective.epsilon)
        found.means["clip_fraction"] = (hit.sum(), hit.numel())
        if step.reference is not None:
            kl = k3_terms(new, step.reference[:, step.iteration], scored)
            found.means["kl"] = (kl.sum(), ran.sum())
        found.sums |= objective.sharing.counts(objective.family)
        return found
