"""What BGPO is compared with, from the same pieces: diffu-GRPO's one-step estimate and the sampled-ELBO ratio.

diffu-GRPO (d1, arXiv 2504.12216) scores tokens in one forward, every completion token hidden and prompt tokens hidden
with probability 0.15: `masked_log_probs` with the completion's real tokens as mask and `prompt_noise` as prompt mask,
the same noise for the old and the new policy; then `token_ratio_terms`.
"""

from __future__ import annotations

import torch

from dta_plugin.diffusion.objectives.bgpo import tangent_exp


def token_ratio_terms(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    scored: torch.Tensor,
    epsilon: float = 0.5,
) -> torch.Tensor:
    """PPO's clipped objective [B], the mean over a completion's scored tokens; to be maximised.

    log_probs, old_log_probs, scored: [B, C]. advantages: [B]. epsilon: the clip range; diffu-GRPO trains with 0.5.
    """
    ratio = tangent_exp((log_probs - old_log_probs).masked_fill(~scored, 0.0))
    advantage = advantages[:, None].to(ratio.dtype)
    terms = torch.minimum(ratio * advantage, ratio.clamp(1.0 - epsilon, 1.0 + epsilon) * advantage)
    return terms.masked_fill(~scored, 0.0).sum(dim=1) / scored.sum(dim=1).clamp(min=1)


@torch.no_grad()
def ratio_clipped(d: torch.Tensor, advantages: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Where the clip of `token_ratio_terms` takes away the gradient, bool in the shape of d; for metrics.

    d: log-ratios. advantages: in a shape that goes with it.
    """
    return torch.where(advantages >= 0, d.exp() > 1.0 + epsilon, d.exp() < 1.0 - epsilon)


def k3_terms(log_probs: torch.Tensor, reference: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of the KL divergence from a reference [B], the mean over scored tokens; to be minimised.

    exp(r) - 1 - r with r the reference's log-prob minus the policy's, as in GRPO. log_probs, reference, scored: [B, C].
    """
    apart = (reference - log_probs).masked_fill(~scored, 0.0)
    return (tangent_exp(apart) - 1.0 - apart).sum(dim=1) / scored.sum(dim=1).clamp(min=1)


def sampled_elbo_ratio(d: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """exp(mean of d) A [B], the objective that BGPO bounds (VRPO-online in the paper); to be maximised.

    d: [B, n] differences of ELBO terms, scaled, all with graph: the memory grows with n.
    """
    return tangent_exp(d.mean(dim=1)) * advantages.to(d.dtype)
