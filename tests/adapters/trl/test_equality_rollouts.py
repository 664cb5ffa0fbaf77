"""Where completions come from: custom rollouts, another engine's log-probs, environments, chats, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.adapters.trl.rollouts import Rollouts, as_if_vllm
from tests.adapters.trl.support import Run, assert_equal, dense_and_tree, prompts, train, weight_difference

TWO_ITERATIONS = {"num_iterations": 2, "max_steps": 4}
TOKEN_LEVEL = {"vllm_importance_sampling_clip_max": 1.05, "vllm_importance_sampling_clip_min": 0.97}
SEQUENCE_LEVEL = {"vllm_importance_sampling_clip_max": 1.1, "vllm_importance_sampling_clip_min": 0.9}
RATIO = "sampling/importance_sampling_ratio/"


def rollouts(**options: Any) -> dict[str, Any]:
    return {"rollout_func": Rollouts(**options)}


def corrects(run: Run) -> bool:
    """Whether the correction for the sampler did something: not all ratios are 1."""
    return all(e[RATIO + "min"] < 0.98 and e[RATIO + "max"] > 1.02 for e in run.metrics if RATIO + "min" in e)


@pytest.mark.parametrize("environment", [False, True], ids=["one_turn", "environment"])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_correction(model: str, tmp_path: Path, mode: str, environment: bool) -> None:
    run: dict[str, Any] = {
        "prepare": as_if_vllm,
        "trainer_options": rollouts(environment=environment),
        "vllm_importance_sampling_mode": mode,
        **(TOKEN_LEVEL if mode.startswith("token") else SEQUENCE_LEVEL),
        **TWO_ITERATIONS,
    }
    dense, tree = dense_and_tree(model, tmp_path, **run)
    assert_equal(dense, tree)
    assert corrects(dense)
    uncorrected = train(model, tmp_path, GRPOTrainer, GRPOConfig, **run | {"prepare": lambda trainer: None})
    assert weight_difference(dense, uncorrected) > 1e-3


@pytest.mark.parametrize("loss", ["vespo", "cispo", "grpo"])
def test_sampler_correction_of_other_losses(model: str, tmp_path: Path, loss: str) -> None:
    dense, tree = dense_and_tree(
        model,
        tmp_path,
        prepare=as_if_vllm,
        trainer_options=rollouts(environment=True),
        vllm_importance_sampling_mode="token_truncate",
        loss_type=loss,
        beta=0.04,
        **TOKEN_LEVEL,
        **TWO_ITERATIONS,
    )
    assert_equal(dense, tree)
    assert corrects(dense)


@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True}, {"off_policy_mask_threshold": 0.005}])
def test_environment_tokens_are_masked(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    run = options | TWO_ITERATIONS
    dense, tree = dense_and_tree(model, tmp_path, trainer_options=rollouts(environment=True), **run)
    assert_equal(dense, tree)
    unmasked = train(model, tmp_path, GRPOTrainer, GRPOConfig, trainer_options=rollouts(), **run)
    assert weight_difference(dense, unmasked) > 1e-3


def test_turns_share_more_than_prompts(model: str, tmp_path: Path) -> None:
    """Pairs of a group share their first turn, too."""
    dense, tree = dense_and_tree(model, tmp_path, trainer_options=rollouts(), num_generations=8)
    assert_equal(dense, tree, least_ratio=2.0)


def test_chats(model: str, tmp_path: Path) -> None:
    dense, tree = dense_and_tree(model, tmp_path, trainer_options={"train_dataset": prompts(conversational=True)})
    assert_equal(dense, tree)


def test_evaluation_during_training(model: str, tmp_path: Path) -> None:
    dense, tree = dense_and_tree(
        model,
        tmp_path,
        dta={"dta_regroup": "never"},
        trainer_options={"eval_dataset": prompts(count=4)},
        eval_strategy="steps",
        eval_steps=1,
        beta=0.04,
        gradient_accumulation_steps=2,
    )
    assert_equal(dense, tree, least_ratio=1.0)
    evaluations = [entry for entry in tree.metrics if "eval_loss" in entry]
    assert len(evaluations) == 3 and all(entry["eval_kl"] > 0 for entry in evaluations)
