"""`dta/*_load_*` in TRL's log: what was predicted and measured of the spread of work in an optimizer step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, load_balance
from tests.adapters.trl.support import Run, build, prompts, train
from tests.adapters.trl.test_regroup import SEPARATE

SPREAD = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
PREDICTED, MEASURED = "dta/micro_batch_load_predicted", "dta/micro_batch_load_measured"
REPEATED = "dta/duplicated_prefix_tokens"


def tree_run(model: str, output: Path, **config: Any) -> Run:
    return train(model, output, TreeGRPOTrainer, TreeGRPOConfig, **SPREAD | config)


def test_micro_batches(model: str, tmp_path: Path) -> None:
    run = tree_run(model, tmp_path, **SEPARATE)
    for entry in run.dta:
        assert 1 <= entry[PREDICTED] < 1.5 and 1 <= entry[MEASURED] <= 2
        assert not any("rank_load" in name for name in entry)
        assert entry[REPEATED] < 2 * 6  # groups are whole; the words that all prompts begin with are not


def test_siblings_apart_are_counted(model: str, tmp_path: Path) -> None:
    """Left in TRL's order, the two micro-batches compute exactly as many tokens more than one tree would."""
    apart = tree_run(model, tmp_path, dta_regroup="never", max_steps=1, **SEPARATE).dta[0]
    merged = tree_run(model, tmp_path, dta_merge_window="always", max_steps=1).dta[0]
    assert apart[REPEATED] == 2 * apart["dta/tree_tokens"] - merged["dta/tree_tokens"] > 20
    assert merged[REPEATED] == 0
    assert PREDICTED not in merged and MEASURED not in merged


def test_one_micro_batch_has_no_spread(model: str, tmp_path: Path) -> None:
    run = tree_run(model, tmp_path, steps_per_generation=1, gradient_accumulation_steps=1)
    assert all(PREDICTED not in entry and entry[REPEATED] == 0 for entry in run.dta)


@pytest.mark.parametrize("logging", [{"logging_steps": 2}, {"logging_strategy": "epoch", "max_steps": 8}])
def test_every_step_is_in_the_next_log(model: str, tmp_path: Path, logging: dict[str, Any]) -> None:
    run = tree_run(model, tmp_path, **SEPARATE, **{"max_steps": 4, "num_iterations": 2} | logging)
    assert run.dta and all(PREDICTED in entry and MEASURED in entry for entry in run.dta)


def test_evaluation_leaves_no_load(model: str, tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": prompts(8)}}
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **SPREAD, **SEPARATE, **evaluated)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any("_load_" in name or "duplicated" in name for entry in evaluations for name in entry)
    assert all(1 <= entry[PREDICTED] < 1.5 for entry in trainer.state.log_history if "loss" in entry)


def test_measured_follows_the_work(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that is slow in every second micro-step."""
    scored, calls = load_balance.LoadBalance.scored, 0

    def slow(self: load_balance.LoadBalance, logprobs: torch.Tensor) -> None:
        nonlocal calls
        if logprobs.requires_grad:
            calls += 1
            time.sleep(0.6 * (calls % 2))
        scored(self, logprobs)

    monkeypatch.setattr(load_balance.LoadBalance, "scored", slow)
    run = tree_run(model, tmp_path, max_steps=1, **SEPARATE)
    assert run.dta[0][MEASURED] > 1.6 and run.dta[0][PREDICTED] < 1.5


def test_waiting_is_not_measured() -> None:
    """What an autograd callback queued later does, as DDP's wait for other ranks, is no work of this rank."""
    loads = load_balance.LoadBalance()
    loads._plan, loads._device = [(1.0, 0.0)], torch.device("cpu")
    weight = torch.ones(3, requires_grad=True)
    loads.hands_out(0)
    logprobs = weight * 2
    loads.scored(logprobs)
    time.sleep(0.3)  # the loss, with its metrics over all ranks

    def last(_: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.3))

    weight.register_hook(last)
    logprobs.sum().backward()
    (step,) = loads._current
    assert len(step.spans) == 2 and 0 < step.seconds < 0.2
