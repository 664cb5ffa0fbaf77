"""Hooks of the user: one that only looks is told what it sees; what a loss may read, or changes gradients, is stock.

Each has its negative control: without the check the training is another one, and nobody would know.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from dta_plugin.adapters.trl import exchange, hooks, merging, scoring, shared_prefixes
from dta_plugin.errors import UnsupportedError
from tests.adapters.trl.all_trainers import STEPS, words
from tests.adapters.trl.support import TOLERANCE, Run, difference, enabled, moved, train, weight_difference
from tests.adapters.trl.trainer_table import run as run_of

# Without what would hide a factor on all gradients.
GRPO: dict[str, Any] = {"loss_type": "grpo", "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
WINDOWS: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def keep(found: list[torch.Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    found.append(output if isinstance(output, torch.Tensor) else output[0])


def clip(module: nn.Module, before: Any, after: Any) -> Any:
    return tuple(None if gradient is None else 1e-2 * gradient.sign() for gradient in before)


def first_layer(trainer: Any) -> nn.Module:
    layer: nn.Module = trainer.model.get_submodule("model.layers.0")
    return layer


class CalmSFT(SFTTrainer):
    """A term on the activations of the first layer, which a hook has kept."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found: list[torch.Tensor] = []
        handle = first_layer(self).register_forward_hook(partial(keep, found))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        handle.remove()
        return loss + 0.1 * found[-1].pow(2).mean()


class CalmGRPO(GRPOTrainer):
    """The same; without gradients behind the layer, whose graph a tree has consumed by then."""

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = first_layer(self).register_forward_hook(partial(keep, found))
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        handle.remove()
        return loss * (1 + found[-1].detach().pow(2).mean())


def sft(model: str, folder: Path, trainer_class: type = SFTTrainer, flag: bool = True, clips: bool = False) -> Run:
    """One batch, the same with and without the flag, of rows of one length: none is padded."""
    rows = Dataset.from_list([{"text": f"{words(8, i // 4)} {words(3, 50 + i)}"} for i in range(16)])
    args = SFTConfig(**STEPS | {"output_dir": str(folder), "per_device_train_batch_size": 16})
    trainer = trainer_class(model, args, train_dataset=rows)
    if clips:
        first_layer(trainer).register_full_backward_hook(clip)
    with enabled() if flag else nullcontext():
        return run_of(trainer)


def test_a_loss_that_reads_activations(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = sft(model, tmp_path, CalmSFT, flag=False)
    assert difference(stock, sft(model, tmp_path, CalmSFT)) <= TOLERANCE
    assert any("a forward hook of tests." in line and "CalmSFT.compute_loss" in line for line in caplog.messages)
    monkeypatch.setattr(shared_prefixes, "hook_obstacle", lambda part, loss: None)
    assert weight_difference(stock, sft(model, tmp_path, CalmSFT)) > 50 * TOLERANCE


def test_gradients_of_tree_tokens(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = sft(model, tmp_path, flag=False, clips=True)
    assert difference(stock, sft(model, tmp_path, clips=True)) <= TOLERANCE
    monkeypatch.setattr(shared_prefixes, "hook_obstacle", lambda part, loss: None)
    assert weight_difference(stock, sft(model, tmp_path, clips=True)) > 50 * TOLERANCE


def clips_first(trainer: Any) -> None:
    first_layer(trainer).register_full_backward_hook(clip)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_grpo_refuses_or_is_stock(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    trainer = CalmGRPO if kind == "forward" else GRPOTrainer
    train_it = partial(train, model, tmp_path, trainer, GRPOConfig, **GRPO)
    if kind == "backward":
        train_it = partial(train_it, prepare=clips_first)
    stock = train_it()
    with (
        enabled(),
        pytest.raises(UnsupportedError, match=rf"a {kind} hook of tests\..* on model\.layers\.0 .*; remove"),
    ):
        train_it()
    with enabled(on_unsupported="dense"):
        assert difference(stock, train_it()) <= TOLERANCE < 1e-3 < moved(stock)
    for module in (hooks, scoring):
        monkeypatch.setattr(module, "hook_obstacle", lambda part, loss: None)
    with enabled():
        assert weight_difference(stock, train_it()) > 50 * TOLERANCE


def test_who_only_looks_is_told(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def prepare(trainer: Any) -> None:
        first_layer(trainer).register_forward_hook(partial(keep, []))

    caplog.set_level(logging.INFO, "dta_plugin")
    stock = train(model, tmp_path, GRPOTrainer, GRPOConfig, prepare, **GRPO)
    with enabled():
        tree = train(model, tmp_path, GRPOTrainer, GRPOConfig, prepare, **GRPO)
    assert difference(stock, tree) <= TOLERANCE and all(entry["dta/dense_fallback"] == 0 for entry in tree.dta)
    said = [line for line in caplog.messages if "sees the tokens of a tree" in line]
    assert len(said) == 1 and "a forward hook of tests.adapters.trl.test_foreign_hooks on model.layers.0" in said[0]


class Watching(TrainerCallback):
    """Clips what each micro-batch has added to the gradients."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weight in kwargs["model"].parameters():
            if weight.grad is not None:
                weight.grad.clamp_(-1e-3, 1e-3)


def on_weights(trainer: Any) -> None:
    for weight in trainer.model.parameters():
        weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def between(trainer: Any) -> None:
    trainer.add_callback(Watching())


@pytest.mark.parametrize("prepare", [on_weights, between])
def test_gradients_of_micro_batches(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, prepare: Any
) -> None:
    caplog.set_level(logging.INFO, "dta_plugin")
    train_it = partial(train, model, tmp_path, GRPOTrainer, GRPOConfig, prepare, **GRPO, **WINDOWS)
    stock = train_it()
    with enabled():
        tree = train_it()
    assert weight_difference(stock, tree) <= TOLERANCE < 1e-3 < moved(stock)
    said = [line for line in caplog.messages if "micro-batches of a window stay" in line]
    assert len(said) == 1 and "regroup='always'" in said[0]
    for module in (exchange, hooks, merging):
        monkeypatch.setattr(module, "window_reader", lambda trainer: None)
    with enabled():
        assert weight_difference(stock, train_it()) > 50 * TOLERANCE


class AsksTheObject(SFTTrainer):
    """Looks for its parent behind the object's class, and tells by it who it is."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        assert self.__class__ is AsksTheObject
        return super(self.__class__, self).compute_loss(*args, **kwargs)


def test_the_class_that_an_object_names_is_its_own(model: str, tmp_path: Path) -> None:
    stock, flagged = (sft(model, tmp_path, AsksTheObject, flag=flag) for flag in (False, True))
    assert difference(stock, flagged) <= TOLERANCE < 1e-3 < moved(stock)
    assert all(entry["dta/dense_fallback"] == 0 for entry in flagged.dta if "dta/dense_fallback" in entry)
