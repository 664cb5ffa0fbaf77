"""Every `dta/*` name that the package logs is in the table, and the docs print that table."""

from __future__ import annotations

import re
from pathlib import Path

from dta_plugin import PrefixTree
from dta_plugin.training.metrics import METRICS, markdown, reduction_of
from dta_plugin.training.run_counts import RunCounts
from dta_plugin.tree.cost import CostEstimate
from dta_plugin.tree.report import TreeReport

ROOT = Path(__file__).parents[2]


def report(sequences: list[list[int]], **fields: object) -> TreeReport:
    values: dict[str, object] = {"chunks": 1, "executor": "packed", "backend": "cpu", "reason": ""}
    values["cost"] = CostEstimate(2.0, 1.0)
    return TreeReport(tree=PrefixTree.from_sequences(sequences), **values | fields)  # type: ignore[arg-type]


def test_names_in_code_are_in_the_table() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "dta_plugin").rglob("*.py")]
    literal = {name for text in sources for name in re.findall(r'"(?:eval_|\{prefix\})?((?:dta|diffusion)/\w+)"', text)}
    names = {metric.name for metric in METRICS}
    assert literal <= names and len(names) == len(METRICS) > 30


def test_the_docs_print_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "metrics.md").read_text("utf-8")


def test_counts_of_a_step() -> None:
    counts = RunCounts()
    counts.add_tree(report([[1, 2, 3], [1, 2, 4]], pruned_tokens=5))
    counts.add_tree(
        report([[7]], pruned_tokens=9, executor="streamed", cost=CostEstimate(9.0, 1.0))
    )  # no loss reads it
    counts.add_dense(10)
    assert counts.micro_batches == 3
    assert counts.metrics() == {
        "dta/flat_tokens": 17,
        "dta/tree_tokens": 15,
        "dta/pruned_tokens": 14,
        "dta/compression_ratio": 16 / 14,
        "dta/flops_ceiling": 1.5,
        "dta/chunks": 2,
        "dta/recomputed_tokens": 0,
        "dta/dense_fallback": 1 / 3,
    }
    assert counts.step_metrics() == counts.metrics() | {"dta/micro_batches": 3, "dta/streamed": 1 / 3}
    assert all(reduction_of(name) in ("sum", "mean", "max") for name in counts.step_metrics())


def test_nothing_to_learn_is_no_compression() -> None:
    counts = RunCounts()
    counts.add_tree(report([[7]], pruned_tokens=9))
    assert counts.metrics()["dta/compression_ratio"] == counts.metrics()["dta/flops_ceiling"] == 1.0
