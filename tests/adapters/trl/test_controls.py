"""Negative controls: faults that the equality tests of this folder must see, and by how much they do.

Each test trains as they do, with one fault put in, and demands a difference far beyond their tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from dta_plugin.attention import TreeMask
from dta_plugin.execution import packed
from dta_plugin.tree.layout import TreeLayout
from tests.adapters.trl.support import TOLERANCE, difference, train, weight_difference

CLEAR = 100 * TOLERANCE


def runs_with_fault(model: str, output: Path, **run: Any) -> tuple[Any, Any]:
    dense = train(model, output, GRPOTrainer, GRPOConfig, **run)
    return dense, train(model, output, TreeGRPOTrainer, TreeGRPOConfig, **run)


def see_siblings(layout: TreeLayout, backend: str) -> TreeMask:
    """Every token of a tree sees everything before it."""
    roots = torch.where(layout.parent < 0, layout.exit, 0).cummax(dim=0).values
    return TreeMask(roots, layout.depth, backend)


def drop_fork_gradients(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Only the first child of a fork passes its gradient on."""
    logprobs, entropies = _edge_logprobs(*args, **kwargs)
    row_of_edge = args[3]
    first = torch.ones_like(row_of_edge, dtype=torch.bool)
    first[1:] = row_of_edge[1:] > row_of_edge[:-1].cummax(dim=0).values
    assert not first.all(), "no fork"
    return torch.where(first, logprobs, logprobs.detach()), entropies


_edge_logprobs = packed.edge_logprobs
_router_loss = packed._router_loss


def test_visible_siblings(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeMask, "from_layout", staticmethod(see_siblings))
    dense, tree = runs_with_fault(model, tmp_path)
    assert abs(dense.metrics[0]["entropy"] - tree.metrics[0]["entropy"]) > CLEAR
    assert weight_difference(dense, tree) > CLEAR


def test_dropped_fork_gradient(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's log-probs are right; its gradient is not."""
    monkeypatch.setattr(packed, "edge_logprobs", drop_fork_gradients)
    dense, tree = runs_with_fault(model, tmp_path)
    assert abs(dense.metrics[0]["entropy"] - tree.metrics[0]["entropy"]) < TOLERANCE
    assert abs(dense.metrics[0]["grad_norm"] - tree.metrics[0]["grad_norm"]) > CLEAR
    assert weight_difference(dense, tree) > CLEAR


def test_ignored_multiplicity(moe_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router loss of a tree's tokens, each counted once."""
    monkeypatch.setattr(
        packed, "_router_loss", lambda model, logits, multiplicity: _router_loss(model, logits, multiplicity**0)
    )
    dense, tree = runs_with_fault(moe_model, tmp_path, router_aux_loss_coef=1.0)
    assert abs(dense.metrics[0]["aux_loss"] - tree.metrics[0]["aux_loss"]) > CLEAR
    assert weight_difference(dense, tree) > CLEAR


@pytest.mark.parametrize("metric", ["entropy", "grad_norm", "reward"])
def test_one_missing_metric(model: str, tmp_path: Path, metric: str) -> None:
    """`difference` itself: a NaN is not equal to a number."""
    run = train(model, tmp_path, GRPOTrainer, GRPOConfig, max_steps=1)
    broken = train(model, tmp_path, GRPOTrainer, GRPOConfig, max_steps=1)
    assert difference(run, broken) == 0
    broken.metrics[0][metric] = float("nan")
    assert difference(run, broken) == difference(broken, run) == float("inf")
