"""TreeReport: what was shared in one call, who executed it and why, and where sharing was lost."""

from __future__ import annotations

from dataclasses import dataclass

from dta_plugin.tree.cost import CostEstimate
from dta_plugin.tree.divergence import Decoder, Fork, find_forks
from dta_plugin.tree.picture import draw_text
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeReport:
    """What one call shared and how it ran. ``print(report)`` is one line.

    Attributes:
        tree: the prefix tree of the batch.
        chunks: model calls.
        executor: "packed", "streamed" or "dense".
        backend: what ran, joined by "+": attention backends, and for recurrent layers "torch scan", "fla levels", "fla
            rescan" and "fla convolution" (flash-linear-attention), or "nodes" (the model's own forward, node by node).
        reason: why tree or dense, and what keeps a tree above the token budget from being streamed.
        cost: dense and as a tree, in forward FLOPs (see tree/cost.py).
        peak_tokens: streamed only, most tokens whose activations are alive at once.
        recomputed_tokens: streamed only, tokens that a backward pass runs forward once more.
        pruned_tokens: tokens of the batch that no loss reads, left out before the tree was made (not in flat_tokens).
        seconds: dense and as a tree, forward and backward, as `dta calibrate` predicts it; None where it does not.
    """

    tree: PrefixTree
    chunks: int
    executor: str
    backend: str
    reason: str
    cost: CostEstimate
    peak_tokens: int | None = None
    recomputed_tokens: int = 0
    pruned_tokens: int = 0
    seconds: CostEstimate | None = None

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up over dense by FLOP count, 1 or more."""
        return max(self.cost.ceiling, 1.0)

    @property
    def flat_tokens(self) -> int:
        return self.tree.flat_tokens

    @property
    def tree_tokens(self) -> int:
        return self.tree.tree_tokens

    @property
    def compression_ratio(self) -> float:
        return self.tree.compression_ratio

    @property
    def is_idle(self) -> bool:
        """Whether no loss reads any row: all were pruned to their first token, and what these share says nothing."""
        return self.pruned_tokens > 0 and self.flat_tokens == self.tree.num_sequences

    def forks(self, limit: int = 5, tokenizer: Decoder | None = None) -> list[Fork]:
        """Where siblings part, the forks that cost most sharing first.

        Args:
            limit: the most forks to return.
            tokenizer: anything with ``decode(token_ids)``, for the text around the forks; None: without.

        Returns:
            The forks, with what their branches repeat, in tokens.
        """
        return find_forks(self.tree, tokenizer, limit)

    def picture(self, max_lines: int = 40) -> str:
        """The tree drawn in text.

        Args:
            max_lines: larger trees are summed up to as many lines.

        Returns:
            The lines, joined.
        """
        return draw_text(self.tree, max_lines)

    def __str__(self) -> str:
        if self.is_idle:
            return (
                f"{self.tree.num_sequences} sequences, {self.pruned_tokens} tokens pruned: no loss reads any of them "
                "(advantages are 0 where all rewards of a group are equal)"
            )
        pruned = f", {self.pruned_tokens} more pruned" if self.pruned_tokens else ""
        return (
            f"{self.tree.num_sequences} sequences, {self.flat_tokens} -> {self.tree_tokens} tokens{pruned} "
            f"({self.compression_ratio:.2f}x shared, up to {self.ceiling:.2f}x faster by FLOPs), "
            f"{self.executor} on {self.backend}{self._chunking()}: {self.reason}"
        )

    def _chunking(self) -> str:
        if self.peak_tokens is None:
            return ""
        share = self.recomputed_tokens / self.tree_tokens
        return f" in {self.chunks} chunks of up to {self.peak_tokens} tokens ({share:.0%} recomputed)"
