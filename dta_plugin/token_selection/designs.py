"""Sampling designs over the tokens of one sequence: which token is kept with what probability.

Token numbers t run from 1 to T. A design has inclusion probabilities p_t = P(t is kept) > 0. The Horvitz-Thompson
estimator sums kept values times 1 / p_t: its mean is the full sum for any such design.

NAT (arXiv 2603.06619) names two designs, uniform random sampling (URS) and random prefix cutting (RPC). Its law of
cuts was not accessible to us: `uniform_cut` is the plain reading, `floored_cut` and `two_point_cut` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BISECTIONS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Independent:
    """Every token by itself, Bernoulli(p_t)."""

    probabilities: np.ndarray  # float64 [T]

    def kept(self, rng: np.random.Generator) -> np.ndarray:
        """Draw: bool [T]."""
        return rng.random(len(self.probabilities)) < self.probabilities


@dataclass(frozen=True, slots=True, eq=False)
class PrefixCut:
    """Tokens 1..L of a random length L with P(L >= t) = p_t, non-increasing.

    One uniform number u gives the cut, L = #{t : p_t > u}, so cuts of several sequences can be drawn together.
    """

    probabilities: np.ndarray  # float64 [T]

    def cut(self, u: float) -> np.ndarray:
        """bool [T] for a number u in [0, 1)."""
        return self.probabilities > u


Design = Independent | PrefixCut


def bernoulli(tokens: int, budget: float, min_prefix: int, floor: float) -> Independent:
    """URS: tokens 1..min_prefix, and each other one with the probability that keeps `budget * tokens` on average."""
    return Independent(_constant_after_prefix(tokens, budget, min_prefix, floor))


def uniform_cut(tokens: int, budget: float, min_prefix: int, floor: float) -> PrefixCut:
    """RPC: a cut anywhere from min_prefix to T, all alike; from a later token than T where the budget is above half.

    Keeps (T + min_prefix) / 2 tokens or more, and weighs the last one up to T - min_prefix + 1 times. floor: unused.
    """
    return _linear_cut(tokens, budget, min_prefix, 0.0, shortest=tokens)


def floored_cut(tokens: int, budget: float, min_prefix: int, floor: float) -> PrefixCut:
    """RPC: no cut with probability `floor`, else one that is uniform up to a horizon that meets the budget.

    No weight is larger than 1 / floor.
    """
    return _linear_cut(tokens, budget, min_prefix, floor, shortest=min_prefix)


def two_point_cut(tokens: int, budget: float, min_prefix: int, floor: float) -> PrefixCut:
    """RPC: min_prefix tokens or all of them."""
    return PrefixCut(_constant_after_prefix(tokens, budget, min_prefix, floor))


def _constant_after_prefix(tokens: int, budget: float, min_prefix: int, floor: float) -> np.ndarray:
    certain = min(min_prefix, tokens)
    share = (budget * tokens - certain) / max(tokens - certain, 1)
    return np.repeat([1.0, np.clip(share, floor, 1.0)], [certain, tokens - certain])


def _linear_cut(tokens: int, budget: float, min_prefix: int, floor: float, shortest: int) -> PrefixCut:
    """p_t = floor + (1 - floor) (M - t + 1) / (M - min_prefix + 1), at most 1 and at least floor, M >= shortest."""
    t = np.arange(1, tokens + 1)

    def survival(horizon: float) -> np.ndarray:
        falling = (horizon - t + 1) / (horizon - min_prefix + 1)
        return floor + (1 - floor) * np.clip(falling, 0.0, 1.0)

    if budget >= 1 or min_prefix >= tokens:
        return PrefixCut(np.ones(tokens))
    low, high = float(shortest), tokens / (1 - budget) + tokens
    if survival(low).sum() >= budget * tokens:
        return PrefixCut(survival(low))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if survival(middle).sum() < budget * tokens else (low, middle)
    return PrefixCut(survival(high))
