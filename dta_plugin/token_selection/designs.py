"""Sampling designs over the tokens of one sequence: which token is kept with what probability, and together with which.

Token numbers t run from 1 to T. A design has inclusion probabilities p_t = P(t is kept) > 0 and joint ones
p_st = P(s and t are kept). The Horvitz-Thompson estimator sums kept values times 1/p_t: its mean is the full sum for
any design with p_t > 0, and its variance is sum_st (p_st / (p_s p_t) - 1) <g_s, g_t>.

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

    def joint(self) -> np.ndarray:
        """p_st, float64 [T, T]; p_tt = p_t."""
        joint = np.outer(self.probabilities, self.probabilities)
        np.fill_diagonal(joint, self.probabilities)
        return joint


@dataclass(frozen=True, slots=True, eq=False)
class FixedSize:
    """The first `certain` tokens, and `size` of the `others` after them, drawn without replacement."""

    certain: int
    size: int
    others: int

    @property
    def probabilities(self) -> np.ndarray:
        share = self.size / max(self.others, 1)
        return np.repeat([1.0, share], [self.certain, self.others])

    def kept(self, rng: np.random.Generator) -> np.ndarray:
        """Draw: bool [T]."""
        kept = np.arange(self.certain + self.others) < self.certain
        kept[self.certain + rng.permutation(self.others)[: self.size]] = True
        return kept

    def joint(self) -> np.ndarray:
        """p_st, float64 [T, T]; size (size - 1) / (others (others - 1)) for two tokens that are drawn."""
        probabilities = self.probabilities
        joint = np.outer(probabilities, probabilities)
        if self.others > 1:
            drawn = slice(self.certain, None)
            joint[drawn, drawn] = self.size * (self.size - 1) / (self.others * (self.others - 1))
        np.fill_diagonal(joint, probabilities)
        return joint


@dataclass(frozen=True, slots=True, eq=False)
class PrefixCut:
    """Tokens 1..L of a random length L with P(L >= t) = p_t, non-increasing.

    One uniform number u gives the cut, L = #{t : p_t > u}, so cuts of several sequences can be drawn together.
    """

    probabilities: np.ndarray  # float64 [T]

    def kept(self, rng: np.random.Generator) -> np.ndarray:
        """Draw: bool [T]."""
        return self.cut(rng.random())

    def cut(self, u: float) -> np.ndarray:
        """bool [T] for a number u in [0, 1)."""
        return self.probabilities > u

    def joint(self) -> np.ndarray:
        """p_st = p_max(s, t), float64 [T, T]."""
        return np.minimum.outer(self.probabilities, self.probabilities)


Design = Independent | FixedSize | PrefixCut


def expected_kept(design: Design) -> float:
    """Mean number of kept tokens, the sum of p_t."""
    return float(design.probabilities.sum())


def variance(design: Design, values: np.ndarray) -> float:
    """Variance of the estimated sum of values [T] or [T, D] (squared length of the deviation, over D)."""
    values = values.reshape(len(values), -1)
    probabilities = design.probabilities
    excess = design.joint() / np.outer(probabilities, probabilities) - 1
    return float((excess * (values @ values.T)).sum())


def bernoulli(tokens: int, budget: float, min_prefix: int, floor: float) -> Independent:
    """URS: tokens 1..min_prefix, and each other one with the probability that keeps `budget * tokens` on average."""
    return Independent(_flat(tokens, budget, min_prefix, floor))


def fixed_size(tokens: int, budget: float, min_prefix: int, floor: float) -> FixedSize:
    """URS with a fixed number of tokens, the nearest to `budget * tokens`; never fewer than `floor` of those drawn."""
    certain = min(min_prefix, tokens)
    others = tokens - certain
    wanted = max(round(budget * tokens) - certain, int(np.ceil(floor * others)))
    return FixedSize(certain, min(wanted, others), others)


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
    return PrefixCut(_flat(tokens, budget, min_prefix, floor))


def _flat(tokens: int, budget: float, min_prefix: int, floor: float) -> np.ndarray:
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
