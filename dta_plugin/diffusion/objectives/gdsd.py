"""GDSD (arXiv 2605.29398): a denoiser is regressed on its own old log-probs, moved by the advantage.

The optimum of E[psi A] - KL(pi, pi_old) has log pi - log pi_old = psi A up to a constant, which advantages of a group,
centred, leave out. So per sample j of n, with u_j the *unweighted* sum of a noised completion's masked log-probs,
d_j = u_j - u_j of the old policy, and W the width of the canvas,

    loss = sum over j of (clamp(d_j, log(1 - epsilon), log(1 + epsilon)) / W - psi A)^2 / n

is a sum over samples: each is back-propagated and freed before the next one runs, and memory does not depend on n.
The clamp is the trust region: a sample beyond it, on either side, has no gradient.

On-policy (d = 0) a sample's gradient is that of -2 psi A d_j / (n W): BGPO's direction (`objectives.bgpo`), with
another weight for each sample and row, as an ELBO weighs u_j by one over the masked share. Off-policy the two differ:
here the gradient fades as d_j / W nears psi A and turns beyond, and a completion without advantage is held in place.
"""

from __future__ import annotations

import math

import torch

from dta_plugin.errors import InvalidInputError


def distance_terms(
    d: torch.Tensor, advantages: torch.Tensor, samples: int, width: int, scale: float, epsilon: float
) -> torch.Tensor:
    """The share [B] of one sample in the squared distance; to be minimised.

    d: [B] differences of unweighted masked log-probs, in nats. advantages: [B]. samples: n. width: W, tokens of the
    canvas. scale: psi, nats per token of the canvas that an advantage of 1 asks for. epsilon: of the clamp.
    """
    low, high = clamp_range(epsilon)
    return (d.clamp(low, high) / width - scale * advantages).square() / samples


def clamp_range(epsilon: float) -> tuple[float, float]:
    """Of d, in nats. Raises InvalidInputError for an epsilon without such a range."""
    if not 0.0 < epsilon < 1.0:
        raise InvalidInputError(
            f"epsilon={epsilon} with objective='gdsd'. Expected a value between 0 and 1: log-ratios are clamped to "
            "log(1 - epsilon) and log(1 + epsilon)."
        )
    return math.log1p(-epsilon), math.log1p(epsilon)


@torch.no_grad()
def clamped(d: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Where the clamp of `distance_terms` takes away the gradient, bool in the shape of d; for metrics."""
    low, high = clamp_range(epsilon)
    return (d < low) | (d > high)
