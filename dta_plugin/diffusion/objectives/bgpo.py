"""BGPO (arXiv 2510.11683): a lower bound of the ELBO objective that is a sum over Monte-Carlo samples.

The objective of a completion is exp(mean_j d_j) A, with d_j the difference of the new and the old policy's ELBO terms
of sample j and A the advantage. Its gradient needs all samples' graphs at once. The bound sum_j g_j does not:

    A >= 0: g_j = (1 + d_j) A / n      exp(x) >= 1 + x
    A <  0: g_j = exp(d_j) A / n       exp(mean) <= mean exp

so every sample can be back-propagated and freed before the next one runs: memory does not depend on n. On-policy
(d = 0) value and gradient are those of the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dta_plugin.errors import InvalidInputError

MAX_EXPONENT = 20.0


def tangent_exp(x: torch.Tensor) -> torch.Tensor:
    """exp(x) up to MAX_EXPONENT, beyond it the tangent there: finite, with a slope that never vanishes.

    A plain clamp would leave exactly the completions that moved furthest without gradient.
    """
    below = x.clamp(max=MAX_EXPONENT)
    return below.exp() * (1.0 + (x - below))


def bound_terms(
    d: torch.Tensor,
    advantages: torch.Tensor,
    samples: int,
    clip: float | None = None,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """The share g_j [B] of one sample in the bound; to be maximised.

    d: [B] difference of the ELBO terms, scaled (`length_scale`). advantages: [B]. samples: n, of the whole sum.

    The bound holds for d up to MAX_EXPONENT; beyond it exp(d) is replaced by its tangent (`tangent_exp`), which is less
    negative. clip: PPO's epsilon; g_j = min(r A, clip(r, 1 - clip, 1 + clip) A) / n with r = 1 + d or exp(d): at or
    below the bound, so still a lower bound, but a looser one, and blind to samples outside. dual_clip: c > 1; negative
    advantages count at most c times. That gives up the bound, for a finite gradient of outliers.
    """
    check_clips(clip, dual_clip)
    ratio = torch.where(advantages >= 0, 1.0 + d, tangent_exp(d))
    share = ratio * advantages
    if clip is not None:
        share = torch.minimum(share, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    if dual_clip is not None:
        share = torch.where(advantages < 0, torch.maximum(share, dual_clip * advantages), share)
    return share / samples


@torch.no_grad()
def clipped(
    d: torch.Tensor, advantages: torch.Tensor, clip: float | None = None, dual_clip: float | None = None
) -> torch.Tensor:
    """Where a clip of `bound_terms` takes away the gradient, bool in the shape of d; for metrics."""
    ratio = torch.where(advantages >= 0, 1.0 + d, tangent_exp(d))
    hit = torch.zeros_like(ratio, dtype=torch.bool)
    if clip is not None:
        hit |= torch.where(advantages >= 0, ratio > 1.0 + clip, ratio < 1.0 - clip)
    if dual_clip is not None:
        hit |= (advantages < 0) & (ratio > dual_clip)
    return hit


def check_clips(clip: float | None, dual_clip: float | None) -> None:
    """Raise InvalidInputError for clip ranges that cannot be."""
    for name, value, least in (("clip", clip, 0.0), ("dual_clip", dual_clip, 1.0)):
        if value is not None and value <= least:
            raise InvalidInputError(f"{name}={value}. Expected None or a value above {least:g}.")


def k2_terms(difference: torch.Tensor) -> torch.Tensor:
    """Half the square of the difference of log-likelihoods: the k2 estimate of a KL divergence, to be minimised.

    Of a mean over samples it is at most the mean over the samples' own, so that is what a bound may subtract.
    """
    return 0.5 * difference.square()


@torch.no_grad()
def bound_gap(d: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Objective minus bound for the samples at hand, float64 [B]: how much the bound gives away; at least 0.

    d: [B, n] collected differences. To second order A d_mean^2 / 2 for A >= 0 (the policy has moved), and
    |A| var(d) / 2 for A < 0 (the samples disagree). Differences above MAX_EXPONENT count as MAX_EXPONENT.
    """
    d, advantages = d.double().clamp(max=MAX_EXPONENT), advantages.double()
    mean = d.mean(dim=1)
    moved = torch.expm1(mean) - mean
    spread = mean.exp() * torch.expm1(d - mean[:, None]).mean(dim=1)
    return torch.where(advantages >= 0, advantages * moved, -advantages * spread).clamp(min=0.0)


def rows_that_count(advantages: torch.Tensor, has_reference: bool) -> torch.Tensor:
    """bool [B]: the rows whose advantage is not 0, or every one, where there is a penalty."""
    return torch.ones_like(advantages, dtype=torch.bool) if has_reference else advantages != 0


def rows_to_run(counts: torch.Tensor, always_run: bool) -> torch.Tensor:
    """int64 [b]: the rows that count, bool [B]; with always_run at least the first."""
    rows = counts.nonzero()[:, 0]
    return rows if len(rows) or not always_run else rows.new_zeros(1)


def check_terms(name: str, terms: torch.Tensor | None, rows: int, samples: int) -> None:
    """Raise InvalidInputError for terms of another policy that are not one per row and sample."""
    if terms is not None and terms.shape != (rows, samples):
        raise InvalidInputError(
            f"{name} of shape {tuple(terms.shape)}. Expected {(rows, samples)}: one term per row and sample, computed "
            "with the same masks."
        )


@dataclass(frozen=True, slots=True, eq=False)
class SampleLoss:
    """One sample's part of the loss. loss: scalar to be back-propagated at once. d: [B] detached, 0 in skipped rows."""

    sample: int
    loss: torch.Tensor
    d: torch.Tensor


def per_sample_losses(
    term: Callable[[int, torch.Tensor], torch.Tensor],
    advantages: torch.Tensor,
    samples: int,
    *,
    old_terms: torch.Tensor | None = None,
    length_scale: torch.Tensor | None = None,
    loss_scale: float = 1.0,
    clip: float | None = None,
    dual_clip: float | None = None,
    reference_terms: torch.Tensor | None = None,
    beta: float = 0.0,
    always_run: bool = False,
) -> Iterator[SampleLoss]:
    """The negated bound, averaged over the batch, sample by sample; the memory-constant loop of BGPO.

        for part in per_sample_losses(term, advantages, n):
            part.loss.backward()        # before the next part: its forward runs when it is asked for

    The sum of the losses is -loss_scale / B * sum over rows and samples of `bound_terms`. Rows of advantage 0 add
    nothing, so they do not run; the means stay over all rows and samples. Where no row is left nothing is yielded,
    unless always_run: ranks that must call the model equally often (DDP, FSDP) then run the first row, at weight 0.

    term: (sample, rows int64 [b]) -> ELBO terms [b] of those rows, with graph. old_terms: [B, n] of the policy that
    generated, with the same noise; None while the policy is still that one: then d = l - detach(l), 0 with the right
    gradient. length_scale: [B] factor of the differences, None for 1. reference_terms: [B, n] of a fixed policy, with
    the same noise; beta times `k2_terms` of the scaled difference from it is then subtracted from the bound, and every
    row runs.
    """
    check_terms("old_terms", old_terms, len(advantages), samples)
    check_terms("reference_terms", reference_terms, len(advantages), samples)
    rows = rows_to_run(rows_that_count(advantages, reference_terms is not None), always_run)
    if not len(rows):
        return
    for sample in range(samples):
        new = term(sample, rows)
        old = new.detach() if old_terms is None else old_terms[rows, sample].to(new.dtype)
        scale = 1.0 if length_scale is None else length_scale[rows].to(new.dtype)
        d = (new - old) * scale
        terms = bound_terms(d, advantages[rows].to(new.dtype), samples, clip, dual_clip)
        if reference_terms is not None:
            terms = terms - beta / samples * k2_terms((new - reference_terms[rows, sample].to(new.dtype)) * scale)
        loss = terms.sum() * (-loss_scale / len(advantages))
        yield SampleLoss(sample, loss, d.detach().new_zeros(len(advantages)).index_put((rows,), d.detach()))
