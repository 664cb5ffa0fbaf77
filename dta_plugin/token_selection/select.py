"""NAT: the policy update on a random subset of tokens, with the full update's loss and gradient on average.

Not All Tokens are Needed (arXiv 2603.06619). A loss that sums over tokens, (1 / Z) sum_t l_t, is estimated by
(1 / Z) sum_t (m_t / p_t) l_t, where m_t says whether token t was drawn, with probability p_t > 0, and Z stays that of
all tokens. Mean and gradient are exact whatever l_t is (clipped ratios, KL, entropy), as long as l_t reads no other
token's log-prob and m is drawn independently of the model.

`TokenSelection` is the choice of a design, `draw` the drawing for a batch. `urs` keeps single tokens: the model runs on
all of them, the LM head only where tokens are kept. The `rpc` designs keep a prefix: nothing behind the cut is computed
at all. See `designs` for what is the paper's and what is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.token_selection import designs
from dta_plugin.token_selection.designs import Design, PrefixCut

_DESIGNS: dict[str, Callable[[int, float, int, float], Design]] = {
    "urs": designs.bernoulli,
    "rpc": designs.floored_cut,
    "rpc-uniform": designs.uniform_cut,
    "rpc-two-point": designs.two_point_cut,
}
SCHEMES = tuple(_DESIGNS)
SHARINGS = ("row", "group")
# Near the least variance where tokens' gradients are unrelated, and where those of a row are alike; with half of the
# tokens off the grid of evenly spread cuts (docs/selection.md).
FLOOR_OF_BUDGET = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSelection:
    """Which tokens carry an update. Raises InvalidInputError for a value that is not one of those described.

    scheme: one of SCHEMES. budget: share of the tokens to keep on average, in (0, 1]. min_prefix: first tokens of
    every row that are always kept. floor: smallest probability of a token, 1 over the largest weight; None is
    FLOOR_OF_BUDGET times the budget. sharing, for cuts: drawn for every row by itself, or spread evenly over a group's
    rows.
    """

    scheme: str
    budget: float = 0.5
    min_prefix: int = 1
    floor: float | None = None
    sharing: str = "group"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InvalidInputError(
                f"token_selection={self.scheme!r}. Expected all or one of {', '.join(SCHEMES)}.",
                option="token_selection",
            )
        if not _is_share(self.budget):
            raise InvalidInputError(
                f"token_budget={self.budget!r}. Expected a share of the tokens in (0, 1].", option="token_budget"
            )
        if self.scheme == "rpc-uniform" and self.budget < 0.5:
            raise InvalidInputError(
                f"token_budget={self.budget} with token_selection=rpc-uniform, whose cuts keep half of the tokens or "
                "more. Expected at least 0.5; rpc reaches any budget above token_floor.",
                option="token_budget",
            )
        if not isinstance(self.min_prefix, int) or self.min_prefix < 1:
            raise InvalidInputError(
                f"token_min_prefix={self.min_prefix!r}. Expected a whole number of tokens, at least 1.",
                option="token_min_prefix",
            )
        if not _is_share(self.smallest_probability):
            raise InvalidInputError(
                f"token_floor={self.floor!r}. Expected a probability in (0, 1].", option="token_floor"
            )
        if self.budget < self.smallest_probability and self.scheme != "rpc-uniform":
            raise InvalidInputError(
                f"token_budget={self.budget} with token_floor={self.floor}: every token is kept with that probability, "
                "so that more are kept. Expected token_floor at most token_budget.",
                option="token_budget",
            )
        if self.sharing not in SHARINGS:
            raise InvalidInputError(
                f"token_sharing={self.sharing!r}. Expected one of {', '.join(SHARINGS)}.", option="token_sharing"
            )

    @property
    def cuts(self) -> bool:
        """Whether it keeps prefixes, so that what is behind them need not run."""
        return self.scheme.startswith("rpc")

    @property
    def smallest_probability(self) -> float:
        """The floor, or what None stands for."""
        return FLOOR_OF_BUDGET * self.budget if self.floor is None else self.floor

    def design(self, tokens: int) -> Design:
        """The design for a row of so many tokens (at least 1)."""
        return _design(self.scheme, tokens, self.budget, self.min_prefix, self.smallest_probability)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0.0 < value <= 1.0


@functools.lru_cache(maxsize=512)
def _design(scheme: str, tokens: int, budget: float, min_prefix: int, floor: float) -> Design:
    return _DESIGNS[scheme](tokens, budget, min_prefix, floor)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One drawing. weights: float64 [B, C], m_t / p_t at tokens that carry loss, 0 at all others.

    probabilities: float64 [B, C], p_t at tokens that carry loss, 1 at all others. carries_loss: bool [B, C].
    entropy: what it was drawn from, (seed, step, rank): the same numbers draw the same.
    """

    weights: np.ndarray
    probabilities: np.ndarray
    carries_loss: np.ndarray
    entropy: tuple[int, int, int]

    def statistics(self) -> dict[str, float]:
        """kept_fraction of the tokens that carry loss, max_weight and mean_weight (1 on average),
        effective_sample_size: (sum w)^2 / sum w^2 as a share of those tokens, 0 where none is kept, and
        predicted_variance: the mean of 1 / p - 1, which the gradient's variance over drawings is, relative to its
        square, where tokens' gradients are unrelated and alike in size."""
        weights = self.weights[self.carries_loss]
        if not len(weights):
            return {}
        squares = float((weights**2).sum())
        return {
            "kept_fraction": float((weights > 0).mean()),
            "max_weight": float(weights.max()),
            "mean_weight": float(weights.mean()),
            "effective_sample_size": float(weights.sum()) ** 2 / squares / len(weights) if squares else 0.0,
            "predicted_variance": float((1 / self.probabilities[self.carries_loss] - 1).mean()),
        }


def draw(
    selection: TokenSelection,
    carries_loss: np.ndarray,
    groups: Sequence[int],
    *,
    seed: int,
    step: int,
    rank: int,
) -> Drawn:
    """Draw for a batch of completions.

    carries_loss: bool [B, C], the tokens whose log-probs the loss reads. Cuts are drawn over positions, up to a row's
    last such token; single tokens among those only. groups: a number per row; equal ones are siblings. seed, step,
    rank: with the row's number they seed its drawing, so that passes differ, ranks differ, and a resumed run repeats.
    """
    if len(groups) != len(carries_loss):
        raise InvalidInputError(f"Got {len(groups)} groups for {len(carries_loss)} rows. Expected one number per row.")
    entropy = (seed, step, rank)
    uniforms = _uniforms(selection.sharing, groups, entropy) if selection.cuts else np.empty(0)
    weights, probabilities = np.zeros(carries_loss.shape), np.ones(carries_loss.shape)
    for row, carries in enumerate(carries_loss):
        candidates = np.flatnonzero(carries)
        if not len(candidates):
            continue
        if selection.cuts:
            candidates = np.arange(candidates[-1] + 1)
        design = selection.design(len(candidates))
        kept = design.cut(uniforms[row]) if isinstance(design, PrefixCut) else design.kept(_generator(entropy, row))
        weights[row, candidates] = kept / design.probabilities
        probabilities[row, candidates] = design.probabilities
    weights[~carries_loss], probabilities[~carries_loss] = 0.0, 1.0
    return Drawn(weights, probabilities, carries_loss, entropy)


def _uniforms(sharing: str, groups: Sequence[int], entropy: tuple[int, int, int]) -> np.ndarray:
    """Per row the number in [0, 1) that its cut is made of; each is uniform by itself.

    Siblings get numbers that are evenly spaced around the circle, in random order, so that a group's kept lengths vary
    far less together than one by one.
    """
    if sharing == "row":
        return np.array([_generator(entropy, row).random() for row in range(len(groups))])
    uniforms = np.empty(len(groups))
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(np.asarray(groups) == group)
        rng = _generator(entropy, int(rows[0]))
        uniforms[rows] = (rng.random() + rng.permutation(len(rows)) / len(rows)) % 1.0
    return uniforms


def _generator(entropy: tuple[int, int, int], row: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([*entropy, row]))
