"""What ran as trees and what did not, added up over a training: its numbers, and one line that says them."""

from __future__ import annotations

from dta_plugin.tree.cost import CostEstimate
from dta_plugin.tree.report import TreeReport

_REASONS = 3  # told apart in the line


class Totals:
    """Sums over the calls of a model. flops, seconds: of all trees, and of what they stand for; seconds are predicted,
    None unless they were for every tree.
    """

    def __init__(self) -> None:
        self.trees = self.flat_tokens = self.tree_tokens = self.pruned_tokens = 0
        self.flops = CostEstimate(0.0, 0.0)
        self.seconds: CostEstimate | None = CostEstimate(0.0, 0.0)
        self._dense: dict[str, tuple[int, str]] = {}

    def add_tree(self, report: TreeReport) -> None:
        self.trees += 1
        self.flat_tokens += report.flat_tokens
        self.tree_tokens += report.tree_tokens
        self.pruned_tokens += report.pruned_tokens
        self.flops += report.cost
        known = self.seconds is not None and report.seconds is not None
        self.seconds = self.seconds + report.seconds if known else None  # type: ignore[operator]

    def add_dense(self, reason: str, topic: str | None = None) -> None:
        """A call that took the model's own path. topic: what is counted together, the reason itself unless given."""
        count, _ = self._dense.get(topic or reason, (0, ""))
        self._dense[topic or reason] = (count + 1, reason)

    @property
    def dense_calls(self) -> int:
        return sum(count for count, _ in self._dense.values())

    @property
    def calls(self) -> int:
        return self.trees + self.dense_calls

    def metrics(self) -> dict[str, float]:
        """For trackers; empty where nothing was called."""
        if not self.calls:
            return {}
        found: dict[str, float] = {"dta/total_dense_fallback": self.dense_calls / self.calls}
        if self.trees:
            found["dta/total_flat_tokens"] = self.flat_tokens
            found["dta/total_tree_tokens"] = self.tree_tokens
            found["dta/total_flops_saved"] = self.flops.saving
            if self.seconds is not None:
                found["dta/total_seconds_saved"] = self.seconds.dense - self.seconds.tree
        return found

    def __str__(self) -> str:
        if not self.trees:
            return f"{_counted(self.dense_calls, 'call')} took the model's own path: {self._why()}"
        pruned = f", {self.pruned_tokens:,} more pruned" if self.pruned_tokens else ""
        line = (
            f"{_counted(self.trees, 'tree')}, {self.flat_tokens:,} -> {self.tree_tokens:,} tokens{pruned} "
            f"({self.flat_tokens / self.tree_tokens:.2f}x shared), {self.flops.saving:.0%} of FLOPs saved"
        )
        if self.seconds is not None:
            saved = self.seconds.dense - self.seconds.tree
            line += f", {saved:,.1f} of {self.seconds.dense:,.1f} s saved as calibrated"
        if self._dense:
            line += f"; {self.dense_calls:,} of {self.calls:,} calls took the model's own path: {self._why()}"
        return line

    def _why(self) -> str:
        most = sorted(self._dense.values(), key=lambda item: -item[0])
        named = "; ".join(f"{reason} ({count:,}x)" for count, reason in most[:_REASONS])
        rest = sum(count for count, _ in most[_REASONS:])
        return named + (f"; other reasons ({rest:,}x)" if rest else "")


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
