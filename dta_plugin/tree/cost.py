"""What a micro-batch costs with and without sharing, in FLOPs: the ceiling of any speed-up.

Linear layers count on tokens, attention on visible query-key pairs, the LM head on scored tokens. The same counts
drive the gate (`min_saving`), `dta inspect`'s prediction and the ceiling column of the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Forward FLOPs of a model's parts.

    per_token: linear layers of all decoder layers, per token.
    per_pair: attention scores and weighted values, per visible pair, summed over full-attention layers.
    per_window_pair: (window, FLOPs) of sliding-window layers, per visible pair inside the window.
    per_scored: LM head, per scored row.
    per_call: what every call of the model costs, however small: launches, Python, the optimizer's view of gradients.
    """

    per_token: float
    per_pair: float
    per_scored: float
    per_window_pair: tuple[tuple[int, float], ...] = ()
    per_call: float = 0.0

    def flops(self, tokens: int, depths: np.ndarray, scored: int) -> float:
        """Forward FLOPs of `tokens` tokens at `depths` (int [tokens], 0-based) with `scored` LM-head rows."""
        visible = depths + 1
        attention = self.per_pair * float(visible.sum())
        for window, cost in self.per_window_pair:
            attention += cost * float(np.minimum(visible, window).sum())
        return self.per_token * tokens + attention + self.per_scored * scored

    def path_flops(self, lengths: np.ndarray) -> np.ndarray:
        """Forward FLOPs of the first `lengths` tokens of a sequence, without LM head. lengths: int [...]."""
        n = lengths.astype(np.float64)
        cost = self.per_token * n + self.per_pair * n * (n + 1) / 2
        for window, per_pair in self.per_window_pair:
            inside = np.minimum(n, window)
            cost += per_pair * (inside * (inside + 1) / 2 + (n - inside) * window)
        return cost


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Forward FLOPs of one micro-batch, dense (every sequence whole) and as a tree. Backward scales both alike."""

    dense: float
    tree: float

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up over dense."""
        return self.dense / self.tree

    @property
    def saving(self) -> float:
        """Share of dense FLOPs that the tree avoids, in [0, 1)."""
        return 1.0 - self.tree / self.dense


def estimate(tree: PrefixTree, model: ModelCost, scored_dense: int, scored_tree: int) -> CostEstimate:
    """Compare dense and tree execution.

    scored_dense: scored tokens, counted per sequence. scored_tree: distinct LM-head rows the tree needs.
    """
    dense_depths = np.arange(tree.flat_tokens) - np.repeat(tree.offsets[:-1], np.diff(tree.offsets))
    return CostEstimate(
        dense=model.flops(tree.flat_tokens, dense_depths, scored_dense),
        tree=model.flops(tree.tree_tokens, tree.depth, scored_tree),
    )
