"""What ran in one mini-batch, for verl's logger."""

from __future__ import annotations

from verl.utils.metric import AggregationType, Metric

from dta_plugin.token_selection.select import Drawn
from dta_plugin.tree.report import TreeReport

_SUM, _MEAN, _MAX = AggregationType.SUM, AggregationType.MEAN, AggregationType.MAX


class Tally:
    """Counts over the micro-batches of a mini-batch on one rank. drawn: its token selection, if there is one."""

    drawn: Drawn | None = None

    def __init__(self) -> None:
        self.reports: list[TreeReport] = []
        self.dense_tokens = self.dense_calls = 0

    def tree(self, report: TreeReport) -> None:
        """A micro-batch that ran as a tree."""
        self.reports.append(report)

    def dense(self, tokens: int) -> None:
        """A micro-batch of so many tokens took verl's own path."""
        self.dense_tokens += tokens
        self.dense_calls += 1

    def metrics(self) -> dict[str, Metric]:
        """Tokens, chunks and micro-batches per rank; ratios, of micro-batches that a loss reads.

        Every rank has all of them, as verl's gathering needs.
        """
        reports = self.reports
        calls = len(reports) + self.dense_calls
        flat = self.dense_tokens + sum(report.flat_tokens for report in reports)
        tree = self.dense_tokens + sum(report.tree_tokens for report in reports)
        idle = sum(report.flat_tokens for report in reports if report.is_idle)
        shared = tree - sum(report.tree_tokens for report in reports if report.is_idle)
        streamed = sum(report.executor == "streamed" for report in reports)
        return self._of_selection() | {
            "dta/flat_tokens": Metric(_SUM, flat),
            "dta/pruned_tokens": Metric(_SUM, sum(report.pruned_tokens for report in reports)),
            "dta/tree_tokens": Metric(_SUM, tree),
            "dta/compression_ratio": Metric(_MEAN, (flat - idle) / shared if shared else 1.0),
            "dta/micro_batches": Metric(_SUM, calls),
            "dta/streamed": Metric(_MEAN, streamed / calls),
            "dta/dense_fallback": Metric(_MEAN, self.dense_calls / calls),
            "dta/chunks": Metric(_SUM, sum(report.chunks for report in reports)),
            "dta/recomputed_tokens": Metric(_SUM, sum(report.recomputed_tokens for report in reports)),
        }

    def _of_selection(self) -> dict[str, Metric]:
        """As `Drawn.statistics`; those of all tokens on a rank that has none to draw from."""
        if self.drawn is None:
            return {}
        found = self.drawn.statistics()
        names = ("kept_fraction", "mean_weight", "effective_sample_size")
        metrics = {f"dta/{name}": Metric(_MEAN, found.get(name, 1.0)) for name in names}
        return metrics | {"dta/max_weight": Metric(_MAX, found.get("max_weight", 1.0))}
