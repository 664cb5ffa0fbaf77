"""What is trained, and how its passes run: references, adapters, checkpointing, experts, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from trl import GRPOConfig, GRPOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from tests.adapters.trl.rollouts import Rollouts
from tests.adapters.trl.support import LORA, Run, assert_equal, dense_and_tree, train, weight_difference

REFERENCE = {"beta": 0.4, "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def with_adapter(model: str) -> Callable[[], PreTrainedModel]:
    """Makes the model with an adapter that has been trained already, so that disabling it is not the reference."""

    def make() -> PreTrainedModel:
        set_seed(3)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LORA)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return adapted

    return make


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_reference_model(model: str, tmp_path: Path, checkpointing: str) -> None:
    dense, tree = dense_and_tree(model, tmp_path, **REFERENCE, **CHECKPOINTING[checkpointing])
    assert_equal(dense, tree)
    assert dense.metrics[1]["kl"] > 0.01


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_new_adapter_whose_reference_is_the_base_model(model: str, tmp_path: Path, checkpointing: str) -> None:
    dense, tree = dense_and_tree(
        model, tmp_path, trainer_options={"peft_config": LORA}, **REFERENCE, **CHECKPOINTING[checkpointing]
    )
    assert_equal(dense, tree)
    assert all("lora" in name for name in tree.weights)
    assert dense.metrics[1]["kl"] > 1e-3


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_given_adapter_whose_reference_is_its_copy(model: str, tmp_path: Path, checkpointing: str) -> None:
    adapters: list[set[str]] = []
    dense, tree = dense_and_tree(
        with_adapter(model),
        tmp_path,
        prepare=lambda trainer: adapters.append(set(trainer.model.peft_config)),
        **REFERENCE,
        **CHECKPOINTING[checkpointing],
    )
    assert_equal(dense, tree)
    assert adapters == [{"default", "ref"}] * 2
    assert dense.metrics[0]["kl"] < 1e-6 < 1e-3 < dense.metrics[1]["kl"]


@pytest.mark.parametrize("options", [{}, {"cast_lm_head_to_fp32": True}, {"gradient_checkpointing": True}])
def test_router_loss(moe_model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """The load-balancing loss counts every token as often as the flat batch has it."""
    run = {"num_iterations": 2, "max_steps": 4, **options}
    dense, tree = dense_and_tree(moe_model, tmp_path, router_aux_loss_coef=1.0, **run)
    assert_equal(dense, tree)
    assert all(entry["aux_loss"] > 0.5 for entry in dense.metrics)
    without = train(moe_model, tmp_path, GRPOTrainer, GRPOConfig, router_aux_loss_coef=0.0, **run)
    assert weight_difference(dense, without) > 1e-3


def test_router_loss_of_shuffled_micro_batches(moe_model: str, tmp_path: Path) -> None:
    steps = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
    dense, tree = dense_and_tree(moe_model, tmp_path, router_aux_loss_coef=1.0, **steps)
    assert_equal(dense, tree)


def test_lm_head_in_float32(model: str, tmp_path: Path) -> None:
    dense, tree = dense_and_tree(model, tmp_path, cast_lm_head_to_fp32=True)
    assert_equal(dense, tree)


@pytest.mark.parametrize("options", [{}, {"cast_lm_head_to_fp32": True}, {"beta": 0.4, "num_iterations": 2}])
def test_bfloat16_is_as_close_to_the_truth_as_dense(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """Under autocast, both are judged against float32. Rollouts are scripted, so that all three see the same tokens.

    SGD: weights are linear in the gradients, so their errors are those of the gradients.
    """
    run = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "trainer_options": {"rollout_func": Rollouts()}}
    run |= options
    truth = train(model, tmp_path, GRPOTrainer, GRPOConfig, **run)
    dense = train(model, tmp_path, GRPOTrainer, GRPOConfig, bf16=True, **run)
    tree = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, bf16=True, **run)
    updates = [_update_error(result, truth) for result in (dense, tree)]
    norms = [_norm_error(result, truth) for result in (dense, tree)]
    print(f"errors of dense and tree: update {updates}, grad_norm {norms}")
    assert all(entry["dta/dense_fallback"] == 0 for entry in tree.dta)
    assert 1e-4 < updates[0] < 0.1, "autocast did nothing, or everything"
    assert updates[1] <= 1.5 * updates[0]
    assert norms[1] <= 1.5 * norms[0] + 1e-3


def _update_error(run: Run, truth: Run) -> float:
    """Error of the weights' change, relative to it (L2 over all weights)."""
    wrong = sum((run.weights[name] - weight).square().sum().item() for name, weight in truth.weights.items())
    change = sum((weight - truth.start[name]).square().sum().item() for name, weight in truth.weights.items())
    return (wrong / change) ** 0.5


def _norm_error(run: Run, truth: Run) -> float:
    """Mean relative error of the gradient norm over the steps."""
    pairs = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(run.metrics, truth.metrics, strict=True)]
    return sum(abs(a - b) / b for a, b in pairs) / len(pairs)
