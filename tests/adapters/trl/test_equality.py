"""Losses and options of GRPO: training as a tree equals stock training, every metric and every weight.

Every case trains several optimizer steps, twice per generation where ratios must leave 1, so that clipping, masks and
off-policy terms take part. LoRA dropout is not compared anywhere: a tree draws one mask per shared token, which is
unbiased, but not what the dense path drew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.adapters.trl.support import assert_equal, dense_and_tree, train, weight_difference

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OFF_POLICY = {"num_iterations": 2, "max_steps": 4}

# Options that change what is learned, each with what it is added to.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beta": (OFF_POLICY, {"beta": 0.4}),
    "beta_without_bias_correction": (OFF_POLICY | {"beta": 0.4}, {"use_bias_correction_kl": False}),
    "entropy_bonus": ({}, {"entropy_coef": 0.2}),
    "adaptive_entropy_bonus": ({}, {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef_delta": 0.2}),
    "top_entropy_quantile": (OFF_POLICY, {"top_entropy_quantile": 0.5}),
    "entropy_bonus_of_top_quantile": ({"top_entropy_quantile": 0.5}, {"entropy_coef": 0.2}),
    "temperature": (OFF_POLICY, {"temperature": 0.7}),
    "two_sided_clipping": ({"num_iterations": 3, "learning_rate": 1e-2}, {"delta": 1.3}),
    "off_policy_mask": (OFF_POLICY, {"off_policy_mask_threshold": 0.02}),
    "clip_higher": (OFF_POLICY, {"epsilon_high": 0.4}),
    "unscaled_rewards": (OFF_POLICY, {"scale_rewards": "none"}),
    "mask_truncated_completions": (OFF_POLICY, {"mask_truncated_completions": True}),
    "padded_to_multiple": ({"beta": 0.4}, {"pad_to_multiple_of": 16}),
}

# How generations are spread over optimizer steps. Rows stay where TRL's shuffle put them (see test_regroup.py).
STEPS: dict[str, dict[str, int]] = {
    "two_iterations": {"num_iterations": 2},
    "three_iterations_of_two": {"num_iterations": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
    "generation_equal_to_window": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "generation_of_two_windows": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "generation_across_windows": {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
    "window_of_two_generations": {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
    "window_of_four_steps": {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(model: str, tmp_path: Path, loss: str, level: str) -> None:
    dense, tree = dense_and_tree(model, tmp_path, loss_type=loss, importance_sampling_level=level, **OFF_POLICY)
    assert_equal(dense, tree)
    if "clip_ratio/region_mean" in dense.metrics[1]:
        assert dense.metrics[1]["clip_ratio/region_mean"] > 0, "nothing was clipped"


@pytest.mark.parametrize("name", OPTIONS)
def test_options(model: str, tmp_path: Path, name: str) -> None:
    base, option = OPTIONS[name]
    dense, tree = dense_and_tree(model, tmp_path, **base, **option)
    assert_equal(dense, tree)
    if name == "padded_to_multiple":
        return
    without = train(model, tmp_path, GRPOTrainer, GRPOConfig, **base)
    assert weight_difference(dense, without) > 1e-3, "the option did nothing"


def test_truncation_is_mixed(model: str, tmp_path: Path) -> None:
    """The completions of these tests end both ways, else mask_truncated_completions would mask all or none."""
    run = train(model, tmp_path, GRPOTrainer, GRPOConfig, **OFF_POLICY)
    assert all(0 < entry["completions/clipped_ratio"] < 1 for entry in run.metrics[::2])


@pytest.mark.parametrize("name", STEPS)
def test_steps(model: str, tmp_path: Path, name: str) -> None:
    dense, tree = dense_and_tree(
        model, tmp_path, dta={"dta_regroup": "never"}, beta=0.04, loss_type="grpo", max_steps=4, **STEPS[name]
    )
    assert_equal(dense, tree, least_ratio=1.0)
