"""Every `dta/*` metric: name, unit, and how it is put together; `python -m dta_plugin.training.metrics` prints them.

Adapters log these names and no others. What a framework does with the values of several optimizer steps, such as their
mean in a log entry, is its own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from dta_plugin.tree.report import TreeReport

Reduction = Literal["sum", "mean", "max"]


class MetricInfo(NamedTuple):
    """One metric. reduction: of the values of several micro-batches, or ranks, to one."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_LOAD = "largest over mean, 1 if even"
METRICS = (
    MetricInfo("dta/flat_tokens", "tokens", "sum", "of the rows that ran as trees, what rows share counted in each"),
    MetricInfo("dta/tree_tokens", "tokens", "sum", "of those trees, what rows share counted once"),
    MetricInfo("dta/pruned_tokens", "tokens", "sum", "left out, because no loss reads their log-probs"),
    MetricInfo("dta/compression_ratio", "ratio", "mean", "flat over tree tokens, where a loss reads any"),
    MetricInfo("dta/flops_ceiling", "ratio", "mean", "largest possible speed-up over the dense path by FLOPs"),
    MetricInfo("dta/chunks", "model calls", "sum", "of the forward pass: 1 per packed tree, more if streamed"),
    MetricInfo("dta/recomputed_tokens", "tokens", "sum", "that a streamed backward pass ran forward again"),
    MetricInfo("dta/dense_fallback", "share of micro-batches", "mean", "that took the framework's own path"),
    MetricInfo("dta/streamed", "share of micro-batches", "mean", "that ran in chunks"),
    MetricInfo("dta/micro_batches", "count", "sum", "of an optimizer step, on one rank"),
    MetricInfo("dta/kept_fraction", "share of tokens", "mean", "that carry loss and were drawn (token selection)"),
    MetricInfo("dta/mean_weight", "weight", "mean", "of tokens that carry loss; 1 on average over drawings"),
    MetricInfo("dta/max_weight", "weight", "max", "the largest of a token, one over its probability"),
    MetricInfo("dta/effective_sample_size", "share of tokens", "mean", "(sum w)^2 / sum w^2 over tokens with loss"),
    MetricInfo("dta/micro_batch_load_predicted", "ratio", "mean", f"cost of micro-batches, by tokens: {_LOAD}"),
    MetricInfo("dta/micro_batch_load_measured", "ratio", "mean", f"seconds of micro-batches: {_LOAD}"),
    MetricInfo("dta/rank_load_predicted", "ratio", "mean", f"cost of ranks, by tokens: {_LOAD}"),
    MetricInfo("dta/rank_load_measured", "ratio", "mean", f"seconds that ranks work by themselves: {_LOAD}"),
    MetricInfo("dta/duplicated_prefix_tokens", "tokens", "sum", "computed more than once, because siblings are apart"),
    MetricInfo("dta/groups", "count", "sum", "in the batch"),
    MetricInfo("dta/groups_split", "count", "sum", "over several ranks or optimizer steps"),
    MetricInfo("dta/token_reduction_ideal", "ratio", "mean", "flat over tree tokens, if all siblings met"),
    MetricInfo("dta/token_reduction_of_shares", "ratio", "mean", "the same, of each rank's rows of a step"),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def reduction_of(name: str) -> Reduction:
    """How values of several micro-batches or ranks become one. Raises KeyError for a name that is not in the table."""
    return _BY_NAME[name].reduction


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
            "dta/streamed": sum(report.executor == "streamed" for report in reports) / calls,
        }


def markdown() -> str:
    """The table for the docs."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| metric | unit | over micro-batches or ranks | |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
