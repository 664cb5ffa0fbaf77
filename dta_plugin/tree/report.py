"""TreeReport: what was shared in one call, who executed it, and why that path was taken."""

from __future__ import annotations

from dataclasses import dataclass

from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True)
class TreeReport:
    """What one call shared and how it ran.

    executor: "packed" or "dense". backend: attention backend that ran. reason: why this executor.
    ceiling: largest possible speed-up over dense by FLOP count (see tree/cost.py).
    verified: largest relative difference to the dense path when the call was verified, else None.
    """

    sequences: int
    flat_tokens: int
    tree_tokens: int
    nodes: int
    chunks: int
    executor: str
    backend: str
    reason: str
    ceiling: float
    verified: float | None = None

    @classmethod
    def of(cls, tree: PrefixTree, **how: object) -> TreeReport:
        """Count `tree` and add `how` it ran: chunks, executor, backend, reason, ceiling, verified."""
        return cls(tree.num_sequences, tree.flat_tokens, tree.tree_tokens, tree.num_nodes, **how)  # type: ignore[arg-type]

    @property
    def compression_ratio(self) -> float:
        return self.flat_tokens / self.tree_tokens

    def __str__(self) -> str:
        line = (
            f"{self.sequences} sequences, {self.flat_tokens} -> {self.tree_tokens} tokens "
            f"({self.compression_ratio:.2f}x shared, up to {self.ceiling:.2f}x faster by FLOPs), "
            f"{self.executor} on {self.backend}: {self.reason}"
        )
        return line if self.verified is None else f"{line}; verified against dense to {self.verified:.1e}"
