"""Attention that is causal over blocks: siblings share their prompt in every update, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dta_plugin.adapters.trl.diffusion.siblings import siblings_together
from dta_plugin.diffusion import prompt_sharing
from tests.adapters.trl import diffusion as tiny

TOLERANCE = 1e-6
CASES: dict[str, dict[str, Any]] = {
    "bgpo, two passes": {"objective": "bgpo", "num_iterations": 2, "beta": 0.5},
    "bgpo, whole groups": {"objective": "bgpo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "bgpo, two steps per generation": {"objective": "bgpo", "steps_per_generation": 4},
    "trajectory, two passes": {"objective": "trajectory", "num_iterations": 2, "beta": 0.5},
    "trajectory, checkpointing": {"objective": "trajectory", "gradient_checkpointing": True},
    "gdsd, two passes": {"objective": "gdsd", "num_iterations": 2},
    "vrpo": {"objective": "vrpo"},
    "diffu-grpo": {"objective": "diffu-grpo", "num_elbo_samples": 16, "prompt_mask_probability": 0.0},
}


def run(output: Path, **options: Any) -> tuple[tiny.Recorder, list[dict[str, float]], int]:
    """What a trainer of a fixed model has done, its log, and the tokens that its updates ran."""
    torch.manual_seed(0)
    policy, tokens = copy.deepcopy(tiny.model()), 0

    def count(_module: Any, inputs: Any, _output: Any) -> None:
        nonlocal tokens
        tokens += inputs[0].numel() if torch.is_grad_enabled() else 0

    policy.get_input_embeddings().register_forward_hook(count)
    trainer = tiny.trainer(output, policy, attention_block_length=2, max_steps=2, **options)
    recorder = tiny.recorded(trainer)
    return recorder, [entry for entry in trainer.state.log_history if "loss" in entry], tokens


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_rows_side_by_side(case: str, tmp_path: Path) -> None:
    own, log, tokens = run(tmp_path / "auto", **CASES[case])
    apart, other, padded = run(tmp_path / "never", share_prompts="never", **CASES[case])
    assert len(own.steps) == 2
    for found, expected in zip(own.steps, apart.steps, strict=True):
        assert tiny.largest_difference(found.gradients, expected.gradients) < TOLERANCE
        assert found.reported == pytest.approx(expected.reported, abs=1e-7)
    flat, tree = (sum(entry[f"diffusion/{name}_tokens"] for entry in log) for name in ("flat", "tree"))
    assert 0 < tree < flat and tokens < padded
    assert not any("diffusion/tree_tokens" in entry for entry in other)


def test_rows_that_part_within_a_block_give_another_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tree in which nobody sees what comes after it in its block."""
    expected = run(tmp_path / "right", share_prompts="never")[0].steps[0].gradients
    right = prompt_sharing.block_tree
    monkeypatch.setattr(prompt_sharing, "block_tree", lambda rows, _: right(rows, 1))
    found = run(tmp_path / "wrong")[0].steps[0].gradients
    assert tiny.largest_difference(found, expected) > 1e-3


def test_siblings_are_side_by_side_and_stay_in_their_optimizer_step() -> None:
    prompts = torch.tensor([[1, 5], [2, 5], [1, 5], [3, 5], [2, 5], [1, 5], [2, 5], [3, 5]])
    number = torch.arange(8)
    buffer = [{"prompt_ids": prompts[i : i + 2], "number": number[i : i + 2], "whole": 7} for i in range(0, 8, 2)]
    found = siblings_together(buffer, 2)
    assert [batch["number"].tolist() for batch in found] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert all(torch.equal(batch["prompt_ids"], prompts[batch["number"]]) and batch["whole"] == 7 for batch in found)
    assert [batch["number"].tolist() for batch in siblings_together(buffer, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
