"""Which tokens a model call of the sampler commits: proposals, their confidence, and how many may stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch

from dta_plugin.diffusion.family import DiffusionFamily
from dta_plugin.diffusion.sampler_config import SamplerConfig


def tokens_per_call(masked: torch.Tensor, config: SamplerConfig) -> Iterable[torch.Tensor]:
    """Per model call of a block: how many of a row's masked tokens [b] it commits at least.

    A fixed number of calls, the remainder first, without those that would commit nothing; with a threshold one token
    per call, without end.
    """
    if config.confidence_threshold is not None:
        return itertools.repeat(torch.ones_like(masked))
    steps = config.calls_per_block
    quotas = [masked // steps + (step < masked % steps) for step in range(steps)]
    return [quota for quota in quotas if bool(quota.any())]


def commit_most_confident(
    tokens: torch.Tensor,
    waiting: torch.Tensor,
    logits: torch.Tensor,
    quota: torch.Tensor,
    family: DiffusionFamily,
    config: SamplerConfig,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Write the proposals of each row's `quota` [b] most confident waiting positions into `tokens` [b, w], in place.

    With a threshold, those of all that reach it as well. Returns which these are, bool [b, w].
    """
    scores = logits[waiting]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores[:, list(family.never_sampled)] = float("-inf")
    proposed = _proposals(scores, config.temperature, generator)
    if config.remasking == "random":
        confidence = torch.rand(proposed.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    else:
        confidence = scores.gather(1, proposed[:, None])[:, 0] - scores.logsumexp(dim=1)
    order = torch.full(waiting.shape, float("-inf"), dtype=scores.dtype, device=scores.device)
    order[waiting] = confidence
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    stays = rank < quota[:, None]
    if config.confidence_threshold is not None:
        stays |= order >= math.log(config.confidence_threshold)
    chosen = waiting & stays
    tokens[chosen] = proposed[chosen[waiting]]
    return chosen


def _proposals(scores: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """A token [M] per row of logits [M, V], drawn from softmax(logits / temperature) by the Gumbel trick in float64.

    Single precision truncates the noise's tail, which lowers the effective temperature (arXiv 2409.02908).
    """
    if temperature == 0:
        return scores.argmax(dim=1)
    uniform = torch.rand(scores.shape, dtype=torch.float64, device=scores.device, generator=generator)
    return (scores.double() - temperature * (-uniform.log()).log()).argmax(dim=1)
