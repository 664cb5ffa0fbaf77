"""Tokens that no loss reads do not run, and nothing but the metric `entropy` can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer
from dta_plugin.adapters.trl.token_weights import reweighted
from dta_plugin.adapters.trl.tokens import pruned
from tests.adapters.trl.support import TOLERANCE, dense_and_tree, difference, reward, train, weight_difference
from tests.adapters.trl.test_selection import apart, one_step, rows, trainer_of

TWICE = {"num_iterations": 2, "max_steps": 4}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")


def flat_for_some(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """As `reward`, but the same for all rollouts of every other prompt: those have advantage 0."""
    return [
        0.5 if len(prompt.split()) % 2 else value for prompt, value in zip(prompts, reward(completions), strict=True)
    ]


def flat(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_with_advantage_zero(model: str, tmp_path: Path, loss: str, level: str) -> None:
    options = {"trainer_options": {"reward_funcs": flat_for_some}, "loss_type": loss, **TWICE}
    dense, tree = dense_and_tree(model, tmp_path, importance_sampling_level=level, **options)
    assert difference(dense, tree) < TOLERANCE
    assert any(entry["dta/pruned_tokens"] > 50 for entry in tree.dta)


def test_rloo(model: str, tmp_path: Path) -> None:
    options = {"trainer_options": {"reward_funcs": flat_for_some}, "beta": 0.0, **TWICE}
    trainers, configs = (RLOOTrainer, TreeRLOOTrainer), (RLOOConfig, TreeRLOOConfig)
    dense, tree = dense_and_tree(model, tmp_path, trainers, configs, **options)
    assert difference(dense, tree) < TOLERANCE
    assert any(entry["dta/pruned_tokens"] > 50 for entry in tree.dta)


@pytest.mark.parametrize("merge", ["never", "always"])
def test_micro_batches_without_any_loss(model: str, tmp_path: Path, merge: str) -> None:
    """A step whose gradient is 0 moves the weights as it does in stock: by momentum and weight decay."""
    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_steps": 3}
    options = {"trainer_options": {"reward_funcs": flat}, **config}
    dense, tree = dense_and_tree(model, tmp_path, dta={"dta_merge_window": merge}, **options)
    assert difference(dense, tree) < TOLERANCE
    assert all(entry["dta/tree_tokens"] <= 8 and entry["dta/compression_ratio"] == 1 for entry in tree.dta)


def test_the_entropy_metric_is_of_the_tokens_that_run(model: str, tmp_path: Path) -> None:
    options = {"trainer_options": {"reward_funcs": flat_for_some}, "max_steps": 2}
    dense, tree = dense_and_tree(model, tmp_path, **options)
    assert tree.metrics[0]["entropy"] == pytest.approx(dense.metrics[0]["entropy"], rel=0.1)
    dense, tree = dense_and_tree(model, tmp_path, **options, dta={"dta_prune": "never"})
    assert tree.metrics[0]["entropy"] == pytest.approx(dense.metrics[0]["entropy"], rel=1e-5)
    assert not any(entry["dta/pruned_tokens"] for entry in tree.dta)


@pytest.mark.parametrize(
    "option",
    [{"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}],
    ids=lambda option: next(iter(option)),
)
def test_other_terms_keep_rows_with_advantage_zero(model: str, tmp_path: Path, option: dict[str, Any]) -> None:
    options = {"trainer_options": {"reward_funcs": flat_for_some}, **option, **TWICE}
    dense, tree = dense_and_tree(model, tmp_path, **options)
    assert difference(dense, tree) < TOLERANCE
    assert not any(entry["dta/pruned_tokens"] for entry in tree.dta)


def test_a_loss_of_its_own_keeps_all_tokens(model: str, tmp_path: Path) -> None:
    class Own(TreeGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return super()._compute_loss(model, inputs)

    options = {"trainer_options": {"reward_funcs": flat_for_some}}
    run = train(model, tmp_path, Own, TreeGRPOConfig, **options)
    assert not any(entry["dta/pruned_tokens"] for entry in run.dta)
    dense = train(model, tmp_path, GRPOTrainer, GRPOConfig, **options)
    assert weight_difference(dense, run) < TOLERANCE


def with_tool_at_the_end(trainer: Any) -> dict[str, Any]:
    inputs = rows(trainer)
    inputs["tool_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    return inputs


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "sapo"])
def test_masked_turns(model: str, tmp_path: Path, loss: str) -> None:
    """A tool's answer at the end does not run; one in the middle runs, but is not scored. All metrics are the same."""
    trainer = trainer_of(model, tmp_path, loss_type=loss, beta=0.2)
    trainer.model.double()
    inputs = with_tool_at_the_end(trainer)
    whole = one_step(trainer, inputs)
    (thinned,) = pruned(trainer, [inputs])
    found = one_step(trainer, thinned)
    assert thinned["dta_left_out"].tolist() == [0, 3]
    assert found[0] == pytest.approx(whole[0], rel=TOLERANCE)
    assert apart(found[1], whole[1]) < 1e-7
    assert found[2] == pytest.approx(whole[2], rel=TOLERANCE)


def test_dropping_a_token_that_counts_is_seen(model: str, tmp_path: Path) -> None:
    """The comparison above can fail."""
    trainer = trainer_of(model, tmp_path, loss_type="grpo")
    inputs = with_tool_at_the_end(trainer)
    (thinned,) = pruned(trainer, [inputs])
    thinned["completion_mask"][1, 1] = 0.0
    assert apart(one_step(trainer, thinned)[1], one_step(trainer, inputs)[1]) > 1e-2


def test_nothing_to_prune_changes_nothing(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, loss_type="grpo")
    inputs = rows(trainer, tools=False)
    assert pruned(trainer, [inputs])[0] is inputs


def test_old_values_cannot_overflow(model: str, tmp_path: Path) -> None:
    """exp(0 - old) of a token that did not run would be infinite, and infinite times 0 is no number."""
    trainer = trainer_of(model, tmp_path, loss_type="grpo")
    inputs = rows(trainer, advantages=(0.8, 0.0))
    inputs["old_per_token_logps"][1] = -200.0
    loss, gradient, _ = one_step(trainer, pruned(trainer, [inputs])[0])
    assert loss == loss and bool(gradient.isfinite().all())


def test_rows_without_a_mask_leave_no_trace_in_the_entropy(model: str, tmp_path: Path) -> None:
    """Truncated rows that are masked are not left out: the first micro-batch of them must not make the loss NaN."""
    trainer = trainer_of(model, tmp_path, loss_type="grpo", entropy_coef=0.1)
    inputs = rows(trainer) | {"completion_mask": torch.zeros(2, 5, dtype=torch.int64)}
    thinned = reweighted(inputs, torch.zeros(2, 5))  # as `pruned` does where another row has masked tokens
    loss, gradient, metrics = one_step(trainer, thinned)
    assert loss == 0.0 and not gradient.any() and metrics["entropy"] == 0.0


def test_advantages_per_token(model: str, tmp_path: Path) -> None:
    """Tokens behind the last one with an advantage do not run, and `entropy` is the mean of those that do."""
    trainer = trainer_of(model, tmp_path, loss_type="grpo")
    inputs = rows(trainer, tools=False)
    inputs["advantages"] = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0], [0.4, 0.2, 0.0, 0.0, 0.0]])
    whole = one_step(trainer, inputs)
    (thinned,) = pruned(trainer, [inputs])
    found = one_step(trainer, thinned)
    assert thinned["dta_left_out"].tolist() == [0, 3]
    assert apart(found[1], whole[1]) < TOLERANCE
    short = inputs | {"completion_mask": (inputs["advantages"] != 0).long()}
    assert found[2]["entropy"] == pytest.approx(one_step(trainer, short)[2]["entropy"], rel=TOLERANCE)


def test_gaps_in_a_completion_mask_keep_all_tokens(model: str, tmp_path: Path) -> None:
    """A subclass's mask may hide a token from the model; weights of 0 would show it to the tokens after it."""
    trainer = trainer_of(model, tmp_path, loss_type="grpo")
    inputs = rows(trainer, advantages=(0.8, 0.0), tools=False)
    inputs["completion_mask"][1, 2] = 0
    assert pruned(trainer, [inputs])[0] is inputs
    inputs["completion_mask"][1, 2] = 1
    assert pruned(trainer, [inputs])[0] is not inputs


def test_a_mask_of_floats_is_no_mask_of_weights(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, loss_type="grpo", beta=0.2)
    inputs = rows(trainer, tools=False)
    whole = one_step(trainer, inputs)
    found = one_step(trainer, inputs | {"completion_mask": inputs["completion_mask"].float()})
    assert found[0] == pytest.approx(whole[0], rel=TOLERANCE)
    assert apart(found[1], whole[1]) < TOLERANCE
