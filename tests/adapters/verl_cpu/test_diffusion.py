"""A diffusion LM in verl's own loop: canvases, rewards, old terms in verl's data, two FSDP2 ranks, weight sync."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from recipes.verl.diffusion import LENGTH, compute_score
from tests.adapters.verl_cpu.test_quickstart import CRASH
from tests.adapters.verl_cpu.test_recipes import RECIPES

pytest.importorskip("dta_plugin.adapters.verl")
STEPS = 3

needs_v1 = pytest.mark.skipif(Version(version("verl")) < Version("0.9"), reason="verl 0.8 has no v1 trainer")


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The recipe for a few steps: what it logged for every step."""
    repository = RECIPES.parent
    subprocess.run([sys.executable, RECIPES / "verl" / "diffusion.py", folder], check=True, cwd=repository)
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(repository)])
    for _ in range(2):
        done = subprocess.run(
            [RECIPES / "verl" / "diffusion.sh", f"trainer.total_training_steps={STEPS}", *overrides],
            cwd=repository,
            env=os.environ | {"DIFFUSION": str(folder), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        if CRASH not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_learning(steps: list[dict[str, Any]], likelihood: str = "log_prob") -> None:
    """Sevens come, and likelihoods of what is written rise from those of random weights."""
    assert len(steps) == STEPS
    assert steps[-1]["critic/score/mean"] > 2 * steps[0]["critic/score/mean"] > 0
    found = [step[f"actor/diffusion/{likelihood}"] for step in steps]
    assert found[-1] > found[0] > -2 * math.log(15)
    assert all(step["actor/grad_norm"] > 0.1 for step in steps)
    assert all(step["actor/entropy"] is None for step in steps)  # NaN: not computed


@needs_v1
def test_two_optimizer_steps_per_batch(tmp_path: Path) -> None:
    """Old ELBO terms travel through verl's data path; so does the whole canvas."""
    steps = train(
        tmp_path,
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "+actor_rollout_ref.rollout.custom.dta.diffusion.objective=bgpo",
        "+actor_rollout_ref.rollout.custom.dta.diffusion.score_fillers=True",
    )
    check_learning(steps, "elbo")
    assert all(step["actor/diffusion/bound_gap"] > 1e-6 for step in steps)
    assert all(step["response_length/min"] == LENGTH for step in steps)


@needs_v1
@pytest.mark.slow
def test_the_record_of_steps_reaches_the_update(tmp_path: Path) -> None:
    """Through verl's data path, to the log-prob pass and to two optimizer steps per batch."""
    steps = train(tmp_path, "actor_rollout_ref.actor.ppo_mini_batch_size=4")
    assert len(steps) == STEPS
    assert steps[-1]["critic/score/mean"] > 1.5 * steps[0]["critic/score/mean"] > 0
    assert all(step["actor/diffusion/log_prob"] < 0 and step["actor/diffusion/max_abs_d"] > 0 for step in steps)


@needs_v1
@pytest.mark.slow
def test_squared_distances(tmp_path: Path) -> None:
    """Old unweighted terms travel; every row counts in the second of two optimizer steps per batch."""
    steps = train(
        tmp_path,
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
        "+actor_rollout_ref.rollout.custom.dta.diffusion.objective=gdsd",
    )
    assert len(steps) == STEPS
    assert steps[-1]["critic/score/mean"] > steps[0]["critic/score/mean"] > 0
    assert all(step["actor/diffusion/max_abs_d"] > 0 and step["actor/diffusion/rows_skipped"] == 0 for step in steps)


@needs_v1
@pytest.mark.slow
def test_on_policy(tmp_path: Path) -> None:
    steps = train(tmp_path)
    check_learning(steps)
    assert all(step["actor/diffusion/clip_fraction"] == 0 and abs(step["actor/loss"]) < 1e-5 for step in steps)


def test_reward() -> None:
    assert compute_score("7 7 1 7") == 3 / LENGTH
    assert compute_score("") == 0
