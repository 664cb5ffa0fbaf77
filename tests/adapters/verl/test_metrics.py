"""verl's own metrics of an update: those that read otherwise are the ones that docs/verl.md names, for every loss."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import FSDPCriticConfig
from verl.workers.utils.losses import value_loss

from dta_plugin.adapters.verl_plugin import critic
from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.config import TreeConfig
from tests.adapters.verl.critics import build_critic, save_critic
from tests.adapters.verl.support import Setup, Step, actor_config, build, mini_batch, nested
from tests.adapters.verl.updates import sampled, updated, without_regularisers

GUIDE = (Path(__file__).parents[3] / "docs" / "verl.md").read_text()
VERLS_OWN_PATH = TreeConfig(min_saving=0.99)
BY_PRUNING = {"actor/ppo_kl"}
BY_MICRO_BATCHES = {"actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"}
OF_CRITICS = {"critic/vf_clipfrac", "critic/vpred_mean"}
COUNT_ALL_TOKENS = {"cispo", "dppo_tv", "dppo_kl"}  # in pg_clipfrac, those without an advantage, too


@pytest.fixture(scope="module")
def engine(folder: Path) -> TreeEngine:
    return build(Setup(), folder, tree=True)


def _otherwise(engine: TreeEngine, loss: str, config: TreeConfig) -> set[str]:
    """Names of metrics that are not verl's own, of an update on rows and tokens without an advantage, and others."""
    data = sampled(engine, Step(extra={"calculate_entropy": False}))
    advantages = [row.clone() for row in data["advantages"].unbind()]
    for index, row in enumerate(advantages):
        row[: len(row) if index % 3 == 0 else 1] = 0
    data["advantages"] = nested(advantages)
    clips = dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), 1e-3)  # dppo's is of probabilities
    actor = replace(without_regularisers(actor_config(Step(loss_mode=loss))), **clips)
    expected, found = (updated(engine, data, options, actor).metrics for options in (VERLS_OWN_PATH, config))
    assert expected["dta/dense_fallback"] == 1 and found["dta/dense_fallback"] == 0
    verls = {name for name in expected if not name.startswith("dta/")}
    assert verls <= found.keys()
    return {name for name in verls if found[name] != pytest.approx(expected[name], rel=1e-4, abs=1e-6)}


@pytest.mark.parametrize("loss", sorted(POLICY_LOSS_REGISTRY.keys() - {"clip_cov"}))  # which draws tokens
def test_only_those_that_the_guide_names(loss: str, engine: TreeEngine) -> None:
    assert not _otherwise(engine, loss, TreeConfig(prune="never", regroup="never"))
    by_pruning = BY_PRUNING | ({"actor/pg_clipfrac", "actor/pg_clipfrac_lower"} if loss in COUNT_ALL_TOKENS else set())
    assert _otherwise(engine, loss, TreeConfig(regroup="never")) <= by_pruning
    assert _otherwise(engine, loss, TreeConfig(prune="never")) <= BY_MICRO_BATCHES
    assert all(f"`{name}`" in GUIDE for name in BY_MICRO_BATCHES | by_pruning)


@pytest.mark.parametrize("loss", sorted(COUNT_ALL_TOKENS & POLICY_LOSS_REGISTRY.keys()))
def test_what_the_guide_says_does_happen(loss: str, engine: TreeEngine) -> None:
    assert "actor/pg_clipfrac" in _otherwise(engine, loss, TreeConfig(regroup="never"))
    assert f"`{loss}`" in GUIDE


def _of_critic(engine: Any) -> dict[str, float]:
    """What verl logs of an update of a critic, before the optimizer's step."""
    data = mini_batch(Step())
    lengths = data["responses"].offsets().diff().tolist()
    data["values"] = nested([0.2 * torch.cos(torch.arange(length)) for length in lengths])
    data["returns"] = nested([torch.sin(1.3 * torch.arange(length)) for length in lengths])
    config = FSDPCriticConfig(strategy="fsdp2", rollout_n=4, use_dynamic_bsz=True, cliprange_value=0.2)
    with engine.train_mode():
        metrics = engine.train_batch(data, loss_function=functools.partial(value_loss, config=config))["metrics"]
    plain = {name: value.aggregate() if hasattr(value, "aggregate") else value for name, value in metrics.items()}
    return {name: fmean(value) if isinstance(value, list) else value for name, value in plain.items()}


def test_critics(folder: Path) -> None:
    critic.configure(TreeConfig())  # of this process, in which other tests leave their own
    model = save_critic(folder)
    found, expected = (_of_critic(build_critic(Setup(), model, tree)) for tree in (True, False))
    assert found["dta/dense_fallback"] == 0 and {"critic/vf_loss", "grad_norm", *OF_CRITICS} <= expected.keys()
    assert {name for name in expected if found[name] != pytest.approx(expected[name], rel=1e-4)} <= OF_CRITICS
    assert all(f"`{name}`" in GUIDE for name in OF_CRITICS)
