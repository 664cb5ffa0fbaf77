"""The other trainers, the in-place patch, and the flag switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

import dta_plugin
from dta_plugin.adapters.trl import (
    TreeGRPOConfig,
    TreeGRPOTrainer,
    TreeRLOOConfig,
    TreeRLOOTrainer,
    TreeTrainerMixin,
)
from tests.adapters.trl.support import (
    LORA,
    Run,
    assert_equal,
    dense_and_tree,
    enabled,
    identical,
    moved,
    no_dense_pass,
    train,
)

RLOO: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"beta": 0.4},
    "normalised_advantages": {"normalize_advantages": True},
    "clipped_rewards": {"reward_clip_range": (0.2, 0.5)},
    "two_iterations": {"num_iterations": 2, "max_steps": 4, "learning_rate": 2e-3},
    "temperature": {"temperature": 0.7},
    "masked_truncations": {"mask_truncated_completions": True},
    "adapter": {"beta": 0.4, "trainer_options": {"peft_config": LORA}},
    "two_windows": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4},
}
PATCHED: dict[str, tuple[type, type, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_iterations": 2, "max_steps": 4}),
    "grpo_adapter": (GRPOTrainer, GRPOConfig, {"beta": 0.4, "trainer_options": {"peft_config": LORA}}),
    "grpo_checkpointing": (GRPOTrainer, GRPOConfig, {"gradient_checkpointing": True, "loss_type": "grpo"}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.4}),
    "gmpo": (GMPOTrainer, GMPOConfig, {"num_iterations": 2, "max_steps": 4}),
}


class TreeGMPOTrainer(TreeTrainerMixin, GMPOTrainer):
    """What a user writes for a trainer of their own."""


@pytest.mark.parametrize("name", RLOO)
def test_rloo(model: str, tmp_path: Path, name: str) -> None:
    dense, tree = dense_and_tree(
        model,
        tmp_path,
        (RLOOTrainer, TreeRLOOTrainer),
        (RLOOConfig, TreeRLOOConfig),
        dta={"dta_regroup": "never"},
        **RLOO[name],
    )
    assert_equal(dense, tree, least_ratio=1.0 if name == "two_windows" else 1.2)


def test_rloo_router_loss(moe_model: str, tmp_path: Path) -> None:
    dense, tree = dense_and_tree(
        moe_model, tmp_path, (RLOOTrainer, TreeRLOOTrainer), (RLOOConfig, TreeRLOOConfig), router_aux_loss_coef=1.0
    )
    assert_equal(dense, tree)
    assert all(entry["aux_loss"] > 0.5 for entry in dense.metrics)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "beta": 0.4}, {"top_entropy_quantile": 0.5}])
def test_mixin_before_another_trainer(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    trainers = (GMPOTrainer, TreeGMPOTrainer)
    dense, tree = dense_and_tree(model, tmp_path, trainers, (GMPOConfig, GMPOConfig), max_steps=4, **options)
    assert_equal(dense, tree)


@pytest.mark.parametrize("name", PATCHED)
def test_patch(model: str, tmp_path: Path, name: str) -> None:
    trainer, config, options = PATCHED[name]
    dense = train(model, tmp_path, trainer, config, **options)
    with no_dense_pass(trainer), enabled():
        tree = train(model, tmp_path, trainer, config, **options)
    assert_equal(dense, tree)


def test_patch_reaches_trainers_that_exist(model: str, tmp_path: Path) -> None:
    dense = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    try:
        tree = train(model, tmp_path, GRPOTrainer, GRPOConfig, prepare=lambda trainer: dta_plugin.enable())
    finally:
        dta_plugin.disable()
    assert_equal(dense, tree)


def is_stock(run: Run, stock: Run) -> bool:
    return identical(run, stock) and not any(run.dta) and moved(run) > 1e-2


@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "num_iterations": 2, "steps_per_generation": 2}])
def test_flag_off_is_stock_bit_for_bit(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    stock = train(model, tmp_path, GRPOTrainer, GRPOConfig, **options)
    assert is_stock(train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, use_dta=False, **options), stock)
    with enabled():
        assert is_stock(train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, use_dta=False, **options), stock)
    assert is_stock(train(model, tmp_path, GRPOTrainer, GRPOConfig, **options), stock), "after disable()"
    assert not is_stock(train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **options), stock)


def test_disable_restores_the_methods() -> None:
    names = ("_get_per_token_logps_and_entropies", "_prepare_inputs")
    own = [trainer.__dict__[name] for trainer in (GRPOTrainer, RLOOTrainer) for name in names]
    with enabled():
        dta_plugin.enable(verify="first")
        assert all(trainer.__dict__[name] not in own for trainer in (GRPOTrainer, RLOOTrainer) for name in names)
    assert [trainer.__dict__[name] for trainer in (GRPOTrainer, RLOOTrainer) for name in names] == own
