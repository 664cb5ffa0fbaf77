"""verl's own training loop, end to end: Ray, agent loop, reward, reference, two FSDP2 ranks, weight sync."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from packaging.version import Version

from recipes.quickstart.rewards import compute_score
from tests.adapters.verl.entry_points import written_to
from tests.adapters.verl_cpu.test_recipes import RECIPES

STEPS = 3
FEW_STEPS = (f"trainer.total_training_steps={STEPS}", "actor_rollout_ref.rollout.calculate_log_probs=True")
VERL_08 = Version(version("verl")) < Version("0.9")
# Between the sampler's probabilities and the actor's: largest, mean. verl 0.8 sends weights to rollouts in bfloat16.
SAMPLER = (5e-2, 5e-3) if VERL_08 else (5e-5, 2e-6)
Metrics = list[dict[str, Any]]
# How Ray reports a worker that a native crash ended. Seen once in stock verl: a SIGSEGV on Ray's own IO thread.
CRASH = "Worker unexpectedly exits with a connection error code 2"

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("dta_plugin.adapters.verl") is None, reason="the verl adapter is not here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("quickstart"))


def built(path: Path, *options: str) -> Path:
    """The quickstart's model, hardly trained, and its data."""
    options = ("--steps", "40", "--prompts", "64", *options)
    subprocess.run([sys.executable, RECIPES / "quickstart" / "build.py", "--output", path, *options], check=True)
    subprocess.run([sys.executable, RECIPES / "verl" / "build.py", path], check=True)
    return path


def train(
    folder: Path, *overrides: str, modules: str = "", packages: str = "", recipe: str = "quickstart"
) -> tuple[Metrics, str]:
    """The recipe for a few steps: what it logged for every step, and what it said.

    modules: for every process. packages: a folder with some that pip has not installed.
    """
    variables = os.environ | variables_for(folder, packages) | {"VERL_USE_EXTERNAL_MODULES": modules}
    return trained(command_for(overrides, recipe), folder, variables)


def trained(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> tuple[Metrics, str]:
    """What a run logged in the folder for every step, and what it said."""
    done = run(command, variables)
    if done.returncode and CRASH in done.stdout:
        done = run(command, variables)
    assert done.returncode == 0, done.stdout[-6000:]
    lines = (folder / "verl" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data"] for line in lines], done.stdout


def variables_for(folder: Path, packages: str = "") -> dict[str, str]:
    path = [packages, os.environ.get("PYTHONPATH", ""), str(RECIPES.parent)]
    return {"QUICKSTART": str(folder), "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def command_for(overrides: Sequence[str], recipe: str = "quickstart") -> list[str]:
    return [str(RECIPES / "verl" / f"{recipe}.sh"), *FEW_STEPS, *overrides]


def run(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=RECIPES.parent,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )


def check_learning(steps: Metrics) -> None:
    """Rewards come in, gradients flow, and rollouts are sampled from the weights that the steps before left."""
    assert len(steps) == STEPS
    for step in steps:
        assert 0 <= step["critic/score/mean"] <= 1
        assert step["training/rollout_probs_diff_valid"] == 1
        assert step["training/rollout_probs_diff_max"] < SAMPLER[0]
        assert step["training/rollout_probs_diff_mean"] < SAMPLER[1]
    assert steps[0]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["actor/kl_loss"] > 1e-5
    assert max(step["actor/grad_norm"] for step in steps) > 1e-3


def test_stock(folder: Path) -> None:
    steps, said = train(folder, "actor_rollout_ref.model.external_lib=null")
    check_learning(steps)
    assert not [name for name in steps[0] if "dta/" in name] and "dta: " not in said


@needs_plugin
def test_plugin(folder: Path) -> None:
    """One line more: the same training, and most tokens are computed once; no group is split across ranks."""
    steps, said = train(folder, modules="dta_plugin.adapters.verl" if VERL_08 else "")
    check_learning(steps)
    assert f"for verl {version('verl')}, process" in said
    for step in steps:
        assert step["actor/dta/compression_ratio"] > 5
        assert step["actor/dta/dense_fallback"] == 0
        assert step["dta/groups_split"] == 0
    flat, tree = (fmean(step[f"actor/dta/{kind}_tokens"] for step in steps) for kind in ("flat", "tree"))
    line = f"dta: in this training: {STEPS} steps, {flat:,.0f} -> {tree:,.0f} tokens"
    assert said.count(line) == 1, [part for part in said.splitlines() if "in this training" in part]


@needs_plugin
@pytest.mark.slow
@pytest.mark.skipif(VERL_08, reason="verl 0.8 sends weights to rollouts in bfloat16")
def test_recurrent_layers(tmp_path: Path) -> None:
    """A Qwen3.5, sampled by transformers and trained as trees: both have the same probabilities."""
    steps, said = train(built(tmp_path, "--hybrid"), recipe="quickstart_qwen3_5")
    assert len(steps) == STEPS and "verl's own path" not in said
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < SAMPLER[0]
        assert step["actor/dta/compression_ratio"] > 5 and step["actor/dta/dense_fallback"] == 0
        assert step["actor/grad_norm"] > 1e-3


@needs_plugin
@pytest.mark.slow
@pytest.mark.skipif(VERL_08, reason="verl 0.8 imports external_lib in workers only")
def test_a_wrong_option_comes_before_the_first_model(folder: Path) -> None:
    option = "+actor_rollout_ref.rollout.custom.dta.exeutor=packed"
    done = run(command_for([option]), os.environ | variables_for(folder))
    assert done.returncode != 0 and "Unknown option(s) exeutor" in done.stdout
    assert "TaskRunner" in done.stdout and "WorkerDict" not in done.stdout and "parameters" not in done.stdout


@needs_plugin
@pytest.mark.slow
@pytest.mark.skipif(VERL_08, reason="verl 0.8 looks for no entry points")
def test_a_critic(folder: Path, tmp_path: Path) -> None:
    """PPO with GAE, stock and with the plugin, whose critic is a tree, too."""
    critic = [
        "algorithm.adv_estimator=gae",
        f"critic.model.path={folder}/verl/model",
        "critic.model.enable_gradient_checkpointing=False",
        "critic.fsdp.use_torch_compile=False",
        "critic.ppo_mini_batch_size=8",
        "critic.optim.lr=1e-3",
    ]
    stock, said = train(folder, "actor_rollout_ref.model.external_lib=null", *critic)
    assert len(stock) == STEPS and all(step["critic/vf_loss"] > 0 for step in stock) and "dta: " not in said
    found, said = train(folder, *critic, packages=str(written_to(tmp_path)))
    assert len(found) == STEPS and "dta: critic: " in said
    for step in found:
        assert step["critic/vf_loss"] > 0
        assert step["critic/dta/compression_ratio"] > 5 and step["critic/dta/dense_fallback"] == 0
        assert step["actor/dta/compression_ratio"] > 5 and step["dta/groups_split"] == 0


def test_prompts_are_those_of_trl(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, verls = (AutoTokenizer.from_pretrained(folder / name) for name in ("model", "verl/model"))
    rows = [folder / "data" / "train.jsonl", folder / "verl" / "train.jsonl"]
    for ours_text, verls_text in zip(*(path.read_text().splitlines() for path in rows), strict=True):
        row, converted = json.loads(ours_text), json.loads(verls_text)
        rendered = verls.apply_chat_template(converted["prompt"], add_generation_prompt=True, return_dict=False)
        assert rendered == ours(row["prompt"]).input_ids
        assert compute_score(f"guess {row['answer']} ", converted["reward_model"]["ground_truth"]) == 1.0
        assert compute_score(f"guess {row['answer'] + 1}", converted["reward_model"]["ground_truth"]) == 0.0
