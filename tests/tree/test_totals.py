"""Totals of a training: sums, the share of FLOPs, reasons counted together, and a line that says it all."""

from __future__ import annotations

from dta_plugin.tree import PrefixTree
from dta_plugin.tree.cost import CostEstimate
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.totals import Totals


def report(seconds: CostEstimate | None = None, pruned: int = 0) -> TreeReport:
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    cost = CostEstimate(100.0, 25.0)
    how = {"chunks": 1, "executor": "packed", "backend": "cpu", "reason": "", "pruned_tokens": pruned}
    return TreeReport(tree=tree, cost=cost, seconds=seconds, **how)  # type: ignore[arg-type]


def test_nothing_was_called() -> None:
    assert Totals().metrics() == {} and Totals().calls == 0


def test_trees_and_fallbacks() -> None:
    totals = Totals()
    for pruned in (0, 5):
        totals.add_tree(report(pruned=pruned))
    for share in (3, 4):
        totals.add_dense(f"only {share}% saved", "gate")
    totals.add_dense("it has no second row")
    assert totals.metrics() == {
        "dta/total_dense_fallback": 0.6,
        "dta/total_flat_tokens": 12,
        "dta/total_tree_tokens": 8,
        "dta/total_flops_saved": 0.75,
    }
    assert str(totals) == (
        "2 trees, 12 -> 8 tokens, 5 more pruned (1.50x shared), 75% of FLOPs saved; 3 of 5 calls took the model's own "
        "path: only 4% saved (2x); it has no second row (1x)"
    )


def test_seconds_only_where_all_are_known() -> None:
    totals = Totals()
    totals.add_tree(report(CostEstimate(4.0, 1.0)))
    totals.add_tree(report(CostEstimate(2.0, 1.0)))
    assert totals.metrics()["dta/total_seconds_saved"] == 4.0
    assert str(totals).endswith("75% of FLOPs saved, 4.0 of 6.0 s saved as calibrated")
    totals.add_tree(report())
    totals.add_tree(report(CostEstimate(2.0, 1.0)))
    assert "dta/total_seconds_saved" not in totals.metrics() and "calibrated" not in str(totals)


def test_many_reasons_stay_one_line() -> None:
    totals = Totals()
    for number in range(6):
        for _ in range(number + 1):
            totals.add_dense(f"reason {number}")
    line = str(totals)
    assert line == (
        "21 calls took the model's own path: reason 5 (6x); reason 4 (5x); reason 3 (4x); other reasons (6x)"
    )
    assert totals.metrics() == {"dta/total_dense_fallback": 1.0}
