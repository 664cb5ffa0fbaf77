"""Models with recurrent layers through TRL's trainers: equal to stock in metrics and weights, as all others are.

What the tolerance rests on is in hybrids.py, and in `test_a_tree_is_as_near_as_other_padding`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from dta_plugin.execution.streaming.state_arena import StateArena
from tests.adapters.trl.hybrids import MIXER_LORA, TextProcessor, needs_them, save_hybrid
from tests.adapters.trl.support import (
    TOLERANCE,
    Run,
    assert_equal,
    dense_and_tree,
    difference,
    enabled,
    tokenizer,
    train,
    weight_difference,
)
from tests.adapters.trl.test_offline import CHANGES, assert_shares
from tests.adapters.trl.test_pruning import flat_for_some
from tests.adapters.trl.test_selection import SCHEMES, apart, average, one_step, rows, trainer_of
from tests.adapters.trl.test_window import SMALL
from tests.support.tree_run import carry_states_across_branches

pytestmark = [needs_them, pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")]

TWICE = {"num_iterations": 2, "max_steps": 4}
REENTRANT, NON_REENTRANT = (
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind}} for kind in (True, False)
)
CHUNKS = {"dta_max_tree_tokens_per_chunk": 40}
LORA: dict[str, Any] = {"trainer_options": {"peft_config": MIXER_LORA}, "beta": 0.4}
ALWAYS = {"dta_merge_window": "always"}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3.5's text class: a delta rule, then attention."""
    return save_hybrid("qwen3_5_text", tmp_path_factory.mktemp("qwen3_5_text"))


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3.5's class for text and images."""
    return save_hybrid("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


CASES: dict[str, dict[str, Any]] = {
    "full": TWICE,
    "streamed_lora": TWICE | LORA | NON_REENTRANT | {"dta": {"dta_max_tree_tokens_per_chunk": 17}},
}
MORE: dict[str, dict[str, Any]] = {
    "reentrant": TWICE | REENTRANT,
    "non_reentrant": TWICE | NON_REENTRANT,
    "reference": TWICE | {"beta": 0.4},
    "lora": TWICE | LORA,
    "lora_reentrant": TWICE | LORA | REENTRANT,
    "streamed": TWICE | {"dta": CHUNKS},
    "streamed_reference_reentrant": TWICE | REENTRANT | {"beta": 0.4, "dta": CHUNKS},
    "merged": SMALL,
    "merged_streamed_lora": SMALL | LORA | {"dta": CHUNKS | ALWAYS},
    "verified": SMALL | {"dta": {"dta_verify": "first"}},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_equal_to_stock(hybrid: str, tmp_path: Path, name: str) -> None:
    dense, tree = dense_and_tree(hybrid, tmp_path, **(CASES | MORE)[name])
    assert_equal(dense, tree)
    if "streamed" in name:
        assert all(entry["dta/chunks"] > 1 for entry in tree.dta)
    if name == "streamed_lora":
        assert sum("linear_attn" in weight for weight in tree.weights) == 10


def test_the_flag(hybrid: str, tmp_path: Path) -> None:
    dense = train(hybrid, tmp_path, GRPOTrainer, GRPOConfig, max_steps=2)
    with enabled():
        assert_equal(dense, train(hybrid, tmp_path, GRPOTrainer, GRPOConfig, max_steps=2))


@pytest.mark.parametrize(
    "options",
    [
        SMALL | {"max_steps": 2},
        pytest.param(TWICE | LORA | REENTRANT | {"dta": CHUNKS}, marks=pytest.mark.slow),
    ],
    ids=["merged", "streamed_lora"],
)
def test_a_model_with_images_on_text(with_images: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """With a processor, by which TRL knows that a model takes images."""
    text = {"processing_class": TextProcessor(tokenizer())} | options.get("trainer_options", {})
    assert_equal(*dense_and_tree(with_images, tmp_path, **options | {"trainer_options": text}))


@pytest.mark.parametrize("family", [pytest.param("bamba", marks=pytest.mark.slow), "lfm2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Mamba 2, and convolutions alone."""
    model = save_hybrid(family, tmp_path / "model")
    assert_equal(*dense_and_tree(model, tmp_path, max_steps=1, dta=CHUNKS))


def test_rows_with_advantage_zero(hybrid: str, tmp_path: Path) -> None:
    dense, tree = dense_and_tree(hybrid, tmp_path, trainer_options={"reward_funcs": flat_for_some}, max_steps=2)
    assert difference(dense, tree) < TOLERANCE
    assert any(entry["dta/pruned_tokens"] > 50 for entry in tree.dta)


@pytest.mark.parametrize("scheme", ["rpc_prefix", pytest.param("urs", marks=pytest.mark.slow)])
def test_the_average_of_a_selection_is_all_tokens(hybrid: str, tmp_path: Path, scheme: str) -> None:
    config = {"loss_type": "grpo", "beta": 0.3}
    trainer = trainer_of(hybrid, tmp_path, **config)
    loss, gradient, metrics = one_step(trainer, rows(trainer))
    found = average(trainer_of(hybrid, tmp_path, **config, **SCHEMES[scheme]))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert apart(found[1], gradient) < 1e-5
    assert found[2]["kl"] == pytest.approx(metrics["kl"], rel=1e-5)


@pytest.mark.parametrize(
    "name,change",
    [
        ("dpo", "lora"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sft", "reentrant"), ("dpo", "plain"))),
    ],
)
def test_offline_trainers(hybrid: str, tmp_path: Path, name: str, change: str) -> None:
    lora = {"peft_config": MIXER_LORA} if change == "lora" else {}
    assert_shares(hybrid, tmp_path, name, **CHANGES[change] | lora)


@pytest.mark.slow
def test_a_tree_is_as_near_as_other_padding(tmp_path: Path) -> None:
    """With the epsilon that Qwen3.5 has, a norm amplifies rounding: a tree's is no larger than that of more padding."""
    model = save_hybrid("qwen3_5_text", tmp_path / "model", rms_norm_eps=1e-6)
    dense, tree = dense_and_tree(model, tmp_path, beta=0.4, **TWICE)
    padded = train(model, tmp_path, GRPOTrainer, GRPOConfig, beta=0.4, pad_to_multiple_of=16, **TWICE)
    assert weight_difference(dense, tree) <= max(TOLERANCE, 3 * weight_difference(dense, padded))
    assert difference(dense, tree) <= max(TOLERANCE, 3 * difference(dense, padded))


def runs_with_fault(model: str, output: Path, **dta: Any) -> tuple[Run, Run]:
    dense = train(model, output, GRPOTrainer, GRPOConfig, max_steps=1)
    return dense, train(model, output, TreeGRPOTrainer, TreeGRPOConfig, max_steps=1, **dta)


@pytest.mark.usefixtures("unprobed")
def test_negative_control_states_of_siblings(hybrid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_states_across_branches(monkeypatch)
    dense, tree = runs_with_fault(hybrid, tmp_path)
    assert weight_difference(dense, tree) > 100 * TOLERANCE


def test_negative_control_states_without_gradients(
    hybrid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateArena, "add_gradient", lambda *_: None)
    dense, tree = runs_with_fault(hybrid, tmp_path, **CHUNKS)
    assert tree.metrics[0]["entropy"] == pytest.approx(dense.metrics[0]["entropy"], rel=TOLERANCE)
    assert weight_difference(dense, tree) > 100 * TOLERANCE
