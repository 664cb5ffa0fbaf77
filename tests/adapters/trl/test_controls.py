"""Negative controls: faults that the equality tests of this folder must see, and by how much they do.

Each test trains as they do, with one fault put in, and demands a difference far beyond their tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from dta_plugin.execution import packed
from tests.adapters.trl.support import TOLERANCE, Run, difference, train, weight_difference
from tests.support import tree_run

CLEAR = 100 * TOLERANCE


def runs_with_fault(model: str, output: Path, **run: Any) -> tuple[Run, Run]:
    dense = train(model, output, GRPOTrainer, GRPOConfig, **run)
    return dense, train(model, output, TreeGRPOTrainer, TreeGRPOConfig, **run)


def apart(dense: Run, tree: Run, metric: str) -> float:
    """Difference of a metric in the first step, before weights differ."""
    return abs(dense.metrics[0][metric] - tree.metrics[0][metric])


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("fault", [tree_run.make_siblings_visible, tree_run.use_layout_positions])
def test_wrong_values(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    fault(monkeypatch)
    dense, tree = runs_with_fault(model, tmp_path)
    assert apart(dense, tree, "entropy") > CLEAR
    assert weight_difference(dense, tree) > CLEAR


@pytest.mark.parametrize("fault", [tree_run.drop_gradient_of_one_child, tree_run.drop_key_gradient_of_one_block])
def test_dropped_gradients(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """The first step's log-probs are right; its gradient is not."""
    fault(monkeypatch)
    dense, tree = runs_with_fault(model, tmp_path)
    assert apart(dense, tree, "entropy") < TOLERANCE
    assert apart(dense, tree, "grad_norm") > CLEAR
    assert weight_difference(dense, tree) > CLEAR


def test_ignored_multiplicity(moe_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router loss of a tree's tokens, each counted once."""
    router_loss = packed._router_loss
    monkeypatch.setattr(packed, "_router_loss", lambda model, logits, count: router_loss(model, logits, count**0))
    dense, tree = runs_with_fault(moe_model, tmp_path, router_aux_loss_coef=1.0)
    assert apart(dense, tree, "aux_loss") > CLEAR
    assert weight_difference(dense, tree) > CLEAR


@pytest.mark.parametrize("metric", ["entropy", "grad_norm", "reward"])
def test_one_missing_metric(model: str, tmp_path: Path, metric: str) -> None:
    """`difference` itself: a NaN is not equal to a number."""
    run, broken = (train(model, tmp_path, GRPOTrainer, GRPOConfig, max_steps=1) for _ in range(2))
    assert difference(run, broken) == 0
    broken.metrics[0][metric] = float("nan")
    assert difference(run, broken) == difference(broken, run) == float("inf")
