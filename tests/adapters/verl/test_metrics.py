"""verl's own metrics of an update: those that read otherwise are the ones that docs/verl.md names, for every loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import Setup, Step, actor_config, build, nested
from tests.adapters.verl.updates import sampled, updated, without_regularisers

GUIDE = (Path(__file__).parents[3] / "docs" / "verl.md").read_text()
VERLS_OWN_PATH = TreeConfig(min_saving=0.99)
BY_PRUNING = {"actor/ppo_kl"}
BY_MICRO_BATCHES = {"actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"}
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
