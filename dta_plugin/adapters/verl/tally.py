"""What ran in one mini-batch, for verl's logger."""

from __future__ import annotations

from verl.utils.metric import AggregationType, Metric

from dta_plugin.tree.report import TreeReport

_SUM, _MEAN = AggregationType.SUM, AggregationType.MEAN


class Tally:
    """Counts over the micro-batches of a mini-batch on one rank."""

    def __init__(self) -> None:
        self.reports: list[TreeReport] = []
        self.dense_tokens = self.dense_calls = 0

    def dense(self, tokens: int) -> None:
        """A micro-batch of so many tokens took verl's own path."""
        self.dense_tokens += tokens
        self.dense_calls += 1

    def metrics(self) -> dict[str, Metric]:
        """Tokens, chunks and micro-batches per rank; ratios. Every rank has all of them, as verl's gathering needs."""
        reports = self.reports
        calls = len(reports) + self.dense_calls
        flat = self.dense_tokens + sum(report.flat_tokens for report in reports)
        tree = self.dense_tokens + sum(report.tree_tokens for report in reports)
        streamed = sum(report.executor == "streamed" for report in reports)
        return {
            "dta/flat_tokens": Metric(_SUM, flat),
            "dta/tree_tokens": Metric(_SUM, tree),
            "dta/compression_ratio": Metric(_MEAN, flat / tree),
            "dta/micro_batches": Metric(_SUM, calls),
            "dta/streamed": Metric(_MEAN, streamed / calls),
            "dta/dense_fallback": Metric(_MEAN, self.dense_calls / calls),
            "dta/chunks": Metric(_SUM, sum(report.chunks for report in reports)),
            "dta/recomputed_tokens": Metric(_SUM, sum(report.recomputed_tokens for report in reports)),
        }
