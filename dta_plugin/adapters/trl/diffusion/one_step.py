"""diffu-grpo in a trainer: token ratios from one forward in which every completion token is hidden (arXiv 2504.12216).

Every pass over a generation batch hides other prompt tokens, the same for the old and for the new policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dta_plugin.adapters.trl.diffusion.config import DiffusionGRPOConfig
from dta_plugin.adapters.trl.diffusion.elbo import Autocast
from dta_plugin.adapters.trl.diffusion.metrics import Statistics, run_statistics
from dta_plugin.adapters.trl.diffusion.rows import MicroStep, Rows
from dta_plugin.diffusion import DiffusionFamily, prompt_noise
from dta_plugin.diffusion.objectives.baselines import k3_terms, token_ratio_terms
from dta_plugin.diffusion.objectives.bgpo import rows_to_run
from dta_plugin.diffusion.objectives.elbo import masked_log_probs


class OneStepObjective:
    """`objective` "diffu-grpo"."""

    passes = 1

    def __init__(self, config: DiffusionGRPOConfig, family: DiffusionFamily, autocast: Autocast) -> None:
        self.config = config
        self.family = family
        self.autocast = autocast

    def log_probs(
        self, model: nn.Module, rows: Rows, iteration: int, which: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probs [b, C] of the completion tokens of these rows (None: all), 0 at padding."""
        prompts = rows.attention_mask[:, : -rows.width]
        noise = prompt_noise(prompts, rows.seeds, self.config.prompt_mask_probability, iteration)
        chosen = slice(None) if which is None else which
        mask = rows.attention_mask[chosen]
        with self.autocast():
            return masked_log_probs(
                model,
                self.family,
                rows.input_ids[chosen],
                mask,
                mask[:, -rows.width :].bool(),
                prompt_mask=noise[chosen],
            )

    @torch.no_grad()
    def stored(self, model: nn.Module, rows: Rows) -> torch.Tensor:
        """Log-probs [B, iterations, C] of a policy that later ones are compared with."""
        passes = range(self.config.num_iterations)
        return torch.stack([self.log_probs(model, rows, iteration) for iteration in passes], dim=1)

    def update(self, model: nn.Module, step: MicroStep) -> OneStepUpdate:
        return OneStepUpdate(self, model, step)


class OneStepUpdate:
    """One micro-step. `losses` first, then `statistics` of what they have seen."""

    def __init__(self, objective: OneStepObjective, model: nn.Module, step: MicroStep) -> None:
        self.objective, self.model, self.step = objective, model, step
        self.scored = step.rows.attention_mask[:, -step.rows.width :].bool()
        self.advantages = step.advantages.masked_fill(~self.scored.any(dim=1), 0.0)
        self.seen: torch.Tensor | None = None

    def losses(self) -> Iterator[torch.Tensor]:
        """The loss, where any row is to run."""
        step, config = self.step, self.objective.config
        which = rows_to_run(self.advantages, step.reference is not None, step.always_run)
        if not len(which):
            return
        new = self.objective.log_probs(self.model, step.rows, step.iteration, which)
        self.seen = new.detach().new_zeros(self.scored.shape).index_put((which,), new.detach())
        scored = self.scored[which]
        old = new.detach() if step.old is None else step.old[which, step.iteration]
        value = token_ratio_terms(new, old, self.advantages[which], scored, config.epsilon)
        if step.reference is not None:
            value = value - config.beta * k3_terms(new, step.reference[which, step.iteration], scored)
        yield value.sum() * (-step.scale / len(self.advantages))

    def statistics(self) -> Statistics:
        """Of the rows that count; a row that runs only because other ranks wait does not."""
        step, config = self.step, self.objective.config
        ran = torch.zeros_like(self.advantages, dtype=torch.bool)
        ran[rows_to_run(self.advantages, step.reference is not None, always_run=False)] = True
        scored = self.scored & ran[:, None]
        new = self.scored.float() if self.seen is None else self.seen
        old = new if step.old is None else step.old[:, step.iteration]
        d = (new - old)[scored]
        found = run_statistics(ran, self.scored.sum(dim=1), d)
        found.means["log_prob"] = (new[scored].sum(), scored.sum())
        advantages = self.advantages[:, None].expand_as(scored)[scored]
        hit = torch.where(advantages >= 0, d.exp() > 1.0 + config.epsilon, d.exp() < 1.0 - config.epsilon)
        found.means["clip_fraction"] = (hit.sum(), hit.numel())
        if step.reference is not None:
            kl = k3_terms(new, step.reference[:, step.iteration], scored)
            found.means["kl"] = (kl.sum(), ran.sum())
        return found
