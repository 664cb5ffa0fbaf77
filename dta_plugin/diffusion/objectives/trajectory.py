"""The trajectory objective: log-probs of what a rollout committed, in the state in which it was committed.

A masked diffusion LM writes a completion y in steps. Given which places each step s commits, the tokens' log-likelihood
is a sum over steps,

    log p(y | steps) = sum_s l_s,    l_s = sum over i committed at s of log p(y_i | what was committed before s, x),

and one forward gives one l_s: hide what was still masked. So the sum over steps of PPO's clipped surrogate of each
step's own ratio, exp of l_s minus the old policy's (`baselines.token_ratio_terms`), is estimated from a few steps, each
back-propagated and freed before the next one runs: memory does not depend on their number, and no bound is needed. An
ELBO is the mean of log p(y | steps) over all orders of writing one token at a time; this is the order that was written.

The probability of the places is left out. Random remasking draws them without looking at the model. Low-confidence
remasking lets proposals decide: there the gradient takes the places as given.
"""

from __future__ import annotations

import torch
from torch import nn

from dta_plugin.diffusion.family import DiffusionFamily
from dta_plugin.diffusion.objectives.elbo import masked_log_probs
from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.diffusion.steps import StepDraws


def step_log_probs(
    model: nn.Module,
    family: DiffusionFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    draws: StepDraws,
    sample: int,
    rows: torch.Tensor,
    sharing: PromptSharing | None = None,
) -> torch.Tensor:
    """Log-probs l_s [b] of what the sample's step committed, from one forward of these rows (int64 [b]).

    input_ids: int64 [B, P + C], prompts and canvases (`SampledCompletions.canvas_ids`) side by side: what a step saw
    includes tokens behind an end token, and masks in blocks that never ran. attention_mask: [B, P + C], 0 at padding.
    sharing: as in `masked_log_probs`.
    """
    found = masked_log_probs(
        model,
        family,
        input_ids[rows],
        attention_mask[rows],
        draws.mask(sample, rows),
        waiting=draws.waiting(sample, rows),
        sharing=sharing,
    )
    return found.sum(dim=1)
