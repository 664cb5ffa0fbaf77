"""One tree per accumulation window: small batches share, and nothing that TRL logs or learns changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from dta_plugin import InvalidInputError
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer, window
from dta_plugin.adapters.trl.micro_batch import MicroBatch
from dta_plugin.execution import calibration_store
from tests.adapters.trl.support import (
    LORA,
    TOLERANCE,
    assert_equal,
    build,
    dense_and_tree,
    difference,
    identical,
    train,
)
from tests.adapters.trl.test_equality_trainers import TreeGMPOTrainer
from tests.adapters.trl.test_regroup import COMPOSITION, mean_ratio

# A batch of one or two rows, of groups of four: siblings meet only across micro-batches.
SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 3}
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo")
ALWAYS = {"dta_merge_window": "always"}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(model: str, tmp_path: Path, loss: str) -> None:
    """Rows stay where TRL put them: all metrics agree, those over micro-batches included."""
    assert_equal(*dense_and_tree(model, tmp_path, loss_type=loss, beta=0.04, **SMALL))


CASES: dict[str, dict[str, Any]] = {
    "two_rows": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "generations_longer_than_windows": {"steps_per_generation": 8, "gradient_accumulation_steps": 4, "max_steps": 4},
    "windows_longer_than_generations": {"steps_per_generation": 4, "gradient_accumulation_steps": 8},
    "two_iterations": {"num_iterations": 2, "max_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "sequence_level": {"importance_sampling_level": "sequence"},
    "lora": {"trainer_options": {"peft_config": LORA}, "beta": 0.04},
    "streamed": {"dta": {"dta_max_tree_tokens_per_chunk": 40, **ALWAYS}},
    "streamed_lora": {"trainer_options": {"peft_config": LORA}, "dta": {"dta_max_tree_tokens_per_chunk": 40, **ALWAYS}},
    "verified": {"dta": {"dta_verify": "first"}},
}


@pytest.mark.parametrize("name", CASES)
def test_settings(model: str, tmp_path: Path, name: str) -> None:
    assert_equal(*dense_and_tree(model, tmp_path, **SMALL | CASES[name]))


@pytest.mark.parametrize("name", [name for name in COMPOSITION if name != "router_loss"])
def test_losses_over_micro_batches(model: str, tmp_path: Path, name: str) -> None:
    """Where rows may not move, windows can still be merged."""
    assert_equal(*dense_and_tree(model, tmp_path, **SMALL, **COMPOSITION[name][0]))


@pytest.mark.parametrize(
    ("trainers", "configs"),
    [
        ((RLOOTrainer, TreeRLOOTrainer), (RLOOConfig, TreeRLOOConfig)),
        ((GMPOTrainer, TreeGMPOTrainer), (GMPOConfig, GMPOConfig)),
    ],
    ids=["rloo", "gmpo"],
)
def test_other_trainers(model: str, tmp_path: Path, trainers: tuple[type, type], configs: tuple[type, type]) -> None:
    assert_equal(*dense_and_tree(model, tmp_path, trainers, configs, beta=0.04, **SMALL))


def test_a_window_shares_what_separate_batches_cannot(model: str, tmp_path: Path) -> None:
    ratios = {
        option: mean_ratio(train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_merge_window=option, **SMALL))
        for option in ("never", "auto", "always")
    }
    assert ratios["never"] == 1.0
    assert ratios["auto"] == ratios["always"] > 1.5


@pytest.mark.parametrize("call_tokens", [0, 64])
def test_auto_leaves_alone_what_would_not_pay(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_tokens: int
) -> None:
    """Whole groups in every micro-batch: one tree for all of them saves a call, and nothing else."""
    monkeypatch.setattr(calibration_store, "_CALL_TOKENS", call_tokens)
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    runs = {
        option: train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_merge_window=option, **whole)
        for option in ("never", "auto", "always")
    }
    tokens = {option: [entry["dta/tree_tokens"] for entry in run.dta] for option, run in runs.items()}
    assert tokens["never"] != tokens["always"]
    assert tokens["auto"] == tokens["always" if call_tokens else "never"]


def test_always_says_why_not(moe_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dta_plugin"):
        train(moe_model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, router_aux_loss_coef=1.0, **SMALL, **ALWAYS)
    assert sum("windows are not merged because of the router loss" in message for message in caplog.messages) == 1


class Interrupted(Exception):
    pass


class InterruptedTrainer(TreeGRPOTrainer):
    """Stops once, in the middle of the second window."""

    is_interrupted = False

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._step == 11 and not self.is_interrupted:
            self.is_interrupted = True
            raise Interrupted
        return super()._prepare_inputs(generation_batch)


def test_an_interrupted_window_is_forgotten(model: str, tmp_path: Path) -> None:
    """What waited for its end is not delivered in the next training."""
    norms = []
    for option in ("never", "always"):
        options = {**SMALL, "dta_merge_window": option, "dta_regroup": "never"}
        trainer = build(model, tmp_path, InterruptedTrainer, TreeGRPOConfig, **options)
        with pytest.raises(Interrupted):
            trainer.train()
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class SkippingTrainer(TreeGRPOTrainer):
    """Finds no signal in the last micro-batch of a window."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if self.accelerator.sync_gradients:
            return sum(p.sum() for p in model.parameters()) * 0.0
        return super()._compute_loss(model, inputs)


def test_a_subclass_that_skips_micro_batches(model: str, tmp_path: Path) -> None:
    """Left alone by "auto"; with "always" no optimizer step is taken without the gradients that wait."""
    options = SMALL | {"dta_regroup": "never"}
    never, auto = (
        train(model, tmp_path, SkippingTrainer, TreeGRPOConfig, dta_merge_window=option, **options)
        for option in ("never", "auto")
    )
    assert identical(never, auto)
    with pytest.raises(InvalidInputError, match="gradients of 7 micro-batches wait"):
        train(model, tmp_path, SkippingTrainer, TreeGRPOConfig, **options, **ALWAYS)


@pytest.mark.parametrize("option", [{"dta_executor": "packed"}, {"dta_backend": "reference"}])
def test_auto_does_not_merge_what_could_not_be_streamed(model: str, tmp_path: Path, option: dict[str, str]) -> None:
    run = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_max_tree_tokens_per_chunk=40, **option, **SMALL)
    assert all(entry["dta/tree_tokens"] < 40 for entry in run.dta)


def test_says_that_windows_are_merged(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **SMALL)
    assert sum("8 micro-batches of an accumulation window run as one tree" in m for m in caplog.messages) == 1


def test_negative_control_gradients_that_wait_are_lost(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = window._Delivery.forward
    monkeypatch.setattr(
        window._Delivery, "forward", staticmethod(lambda ctx, values, waiting, rows: forward(ctx, values, [], rows))
    )
    dense, tree = dense_and_tree(model, tmp_path, **SMALL)
    assert difference(dense, tree) > 1000 * TOLERANCE


def test_other_rows_than_were_buffered_are_an_error() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    first, second = MicroBatch.from_padded(ids, mask, 2), MicroBatch.from_padded(ids + 1, mask, 2)
    opened = object.__new__(window._Window)
    opened.micro_batches, opened.waiting = [first, first], [torch.zeros(1, 2)]
    with pytest.raises(InvalidInputError, match=r"Micro-batch 2 of 2 .* merge_window='never'"):
        opened.take(torch.nn.Linear(1, 1), second, is_last=True)


@pytest.mark.parametrize(("name", "value"), [("use_dta", False), ("dta_verify", "first")])
def test_options_that_change_inside_a_window(model: str, tmp_path: Path, name: str, value: Any) -> None:
    class ChangingTrainer(TreeGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            if self._step == 3:
                setattr(self.args, name, value)
            return super()._compute_loss(model, inputs)

    with pytest.raises(InvalidInputError, match=r"or `disable\(\)` or other options came in between"):
        train(model, tmp_path, ChangingTrainer, TreeGRPOConfig, **SMALL, **ALWAYS)
