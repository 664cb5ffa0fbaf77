"""What a micro-batch costs with and without sharing: in FLOPs, the ceiling of any speed-up, or in seconds.

Linear layers count on tokens, attention on visible query-key pairs, the LM head on scored tokens, and every call of the
model costs something by itself. The same counts drive the gate (`min_saving`), balancing, `dta inspect`'s prediction
and the ceiling column of the benchmarks. Seconds come from a measured `SecondsPerFlop` (see `dta calibrate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dta_plugin.tree.time_model import SecondsPerFlop, Work
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True)
class Padded:
    """A dense micro-batch as frameworks run it: `rows` of `width` tokens, the last `columns` of each scored.

    has_padding: then attention computes whole squares under a mask, else causal triangles.
    """

    rows: int
    width: int
    columns: int
    has_padding: bool


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Forward FLOPs of a model's parts; or, after `in_seconds`, their seconds forward and backward.

    per_token: linear layers of all decoder layers, per token.
    per_pair: attention scores and weighted values, per visible pair, summed over full-attention layers.
    per_window_pair: (window, FLOPs) of sliding-window layers, per visible pair inside the window.
    per_scored: LM head, per scored row.
    per_call: what every call of the model costs, however small.
    """

    per_token: float
    per_pair: float
    per_scored: float
    per_window_pair: tuple[tuple[int, float], ...] = ()
    per_call: float = 0.0

    def in_seconds(self, rates: SecondsPerFlop) -> ModelCost:
        """The same in seconds."""
        return ModelCost(
            per_token=self.per_token * rates.linear,
            per_pair=self.per_pair * rates.attention,
            per_scored=self.per_scored * rates.head,
            per_window_pair=tuple((window, cost * rates.attention) for window, cost in self.per_window_pair),
            per_call=rates.call,
        )

    def work(self, tokens: int, depths: np.ndarray, scored: int) -> Work:
        """One call with `tokens` tokens at `depths` (int [tokens], 0-based) and `scored` LM-head rows."""
        visible = depths + 1
        attention = self.per_pair * float(visible.sum())
        for window, cost in self.per_window_pair:
            attention += cost * float(np.minimum(visible, window).sum())
        return Work(1.0, self.per_token * tokens, attention, self.per_scored * scored)

    def padded_work(self, batch: Padded) -> Work:
        """One dense call; masked attention computes every pair of a square, windows or not."""
        keys = batch.width if batch.has_padding else (batch.width + 1) / 2
        per_pair = self.per_pair + sum(cost for _, cost in self.per_window_pair)
        tokens = batch.rows * batch.width
        return Work(
            1.0, self.per_token * tokens, per_pair * tokens * keys, self.per_scored * batch.rows * batch.columns
        )

    def flops(self, tokens: int, depths: np.ndarray, scored: int) -> float:
        """Cost of `work` without that of the call."""
        return self.work(tokens, depths, scored).flops

    def flops_of_pairs(
        self, tokens: np.ndarray, pairs: Callable[[int | None], np.ndarray], scored: np.ndarray
    ) -> np.ndarray:
        """`flops` of many calls, float64 [...]: tokens and scored int [...], pairs(window) those visible in each."""
        attention = self.per_pair * pairs(None)
        for window, cost in self.per_window_pair:
            attention = attention + cost * pairs(window)
        return self.per_token * tokens + attention + self.per_scored * scored

    def path_flops(self, lengths: np.ndarray) -> np.ndarray:
        """Cost of the first `lengths` tokens of a sequence, without LM head and call. lengths: int [...]."""
        n = lengths.astype(np.float64)
        cost = self.per_token * n + self.per_pair * n * (n + 1) / 2
        for window, per_pair in self.per_window_pair:
            inside = np.minimum(n, window)
            cost += per_pair * (inside * (inside + 1) / 2 + (n - inside) * window)
        return cost


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """One micro-batch dense and as a tree, in forward FLOPs (which backward scales alike) or in seconds."""

    dense: float
    tree: float

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up over dense."""
        return self.dense / self.tree

    @property
    def saving(self) -> float:
        """Share of the dense cost that the tree avoids, below 1; negative where it costs more."""
        return 1.0 - self.tree / self.dense

    def __add__(self, other: CostEstimate) -> CostEstimate:
        return CostEstimate(self.dense + other.dense, self.tree + other.tree)


def estimate(tree: PrefixTree, cost: ModelCost, scored_dense: int, scored_tree: int) -> CostEstimate:
    """Compare dense and tree execution.

    scored_dense: scored tokens, counted per sequence. scored_tree: distinct LM-head rows the tree needs.
    """
    dense_depths = np.arange(tree.flat_tokens) - np.repeat(tree.offsets[:-1], np.diff(tree.offsets))
    return CostEstimate(
        dense=cost.flops(tree.flat_tokens, dense_depths, scored_dense),
        tree=cost.flops(tree.tree_tokens, tree.depth, scored_tree),
    )
