"""What ran of a batch, as a tree or not, counted into metrics."""

from __future__ import annotations

from dta_plugin.tree.report import TreeReport


class RunCounts:
    """What ran: one micro-batch, or those of an optimizer step on one rank."""

    def __init__(self) -> None:
        self.reports: list[TreeReport] = []
        self.dense_tokens = self.dense_calls = 0

    def add_tree(self, report: TreeReport) -> None:
        """A micro-batch that ran as a tree."""
        self.reports.append(report)

    def add_dense(self, tokens: int) -> None:
        """A micro-batch of so many tokens took the framework's own path."""
        self.dense_tokens += tokens
        self.dense_calls += 1

    @property
    def micro_batches(self) -> int:
        return len(self.reports) + self.dense_calls

    def metrics(self) -> dict[str, float]:
        """Always the same names; there is at least one micro-batch. A dense one counts as one without sharing."""
        reports, calls = self.reports, self.micro_batches
        read = [report for report in reports if not report.is_idle]
        flat = self.dense_tokens + sum(report.flat_tokens for report in read)
        tree = self.dense_tokens + sum(report.tree_tokens for report in read)
        ceilings = [report.ceiling for report in read] + [1.0] * self.dense_calls
        return {
            "dta/flat_tokens": self.dense_tokens + sum(report.flat_tokens for report in reports),
            "dta/tree_tokens": self.dense_tokens + sum(report.tree_tokens for report in reports),
            "dta/pruned_tokens": sum(report.pruned_tokens for report in reports),
            "dta/compression_ratio": flat / tree if tree else 1.0,
            "dta/flops_ceiling": sum(ceilings) / len(ceilings) if ceilings else 1.0,
            "dta/chunks": sum(report.chunks for report in reports),
            "dta/recomputed_tokens": sum(report.recomputed_tokens for report in reports),
            "dta/dense_fallback": self.dense_calls / calls,
        }

    def step_metrics(self) -> dict[str, float]:
        """`metrics`, and what is of interest where there are several micro-batches."""
        streamed = sum(report.executor == "streamed" for report in self.reports)
        return self.metrics() | {"dta/micro_batches": self.micro_batches, "dta/streamed": streamed / self.micro_batches}
