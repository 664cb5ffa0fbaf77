"""Updates on a subset of tokens through the real GRPOTrainer: on average the loss and gradient of all tokens.

The average is exact: every drawing that can happen is run, weighted by its probability. Rows are off-policy, so ratios
are clipped; one row has a tool's tokens in the middle; KL and entropy bonus take part where they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer
from dta_plugin.adapters.trl.config import tree_config
from dta_plugin.errors import InvalidInputError
from dta_plugin.token_selection.select import Drawn
from dta_plugin.training import tokens
from tests.adapters.trl.support import build, identical, train
from tests.support.nat import drawings

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
TERMS: dict[str, dict[str, Any]] = {
    "policy": {},
    "kl": {"beta": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "delta": {"delta": 1.1},
}
# Two iterations: in the second one nothing is generated, and rows are handed out as they lie in the buffer.
TWO_PASSES = {"num_iterations": 2, "per_device_train_batch_size": 4, "num_generations": 4}
SCHEMES = {
    "rpc": {"dta_token_selection": "rpc", "dta_token_budget": 0.6},
    "rpc_prefix": {"dta_token_selection": "rpc-two-point", "dta_token_min_prefix": 2},
    "urs": {"dta_token_selection": "urs", "dta_token_budget": 0.5},
}
PROMPTS = [[0, 5, 6, 7], [5, 6, 7, 8]]
COMPLETIONS = [[11, 12, 13, 0, 0], [14, 15, 16, 17, 2]]
TOOLS = [[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]

Step = tuple[float, torch.Tensor, dict[str, float]]  # loss, gradient of all weights in a row, metrics


def rows(trainer: Any, advantages: tuple[float, float] = (0.8, -0.5), tools: bool = True) -> dict[str, Any]:
    """Two rows as TRL buffers them, some ratios beyond the clip range."""
    prompts, completions = torch.tensor(PROMPTS), torch.tensor(COMPLETIONS)
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": (prompts != 0).long(),
        "completion_ids": completions,
        "completion_mask": (completions != 0).long(),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(7),
    }
    if tools:
        inputs["tool_mask"] = torch.tensor(TOOLS)
    ids = torch.cat([prompts, completions], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completions.shape[1])[0]
    inputs["old_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    inputs["ref_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    return inputs


def trainer_of(model: str, folder: Path, **config: Any) -> Any:
    """In the middle of a training: `_prepare_inputs` hands out the second pass over what is buffered."""
    trainer = build(model, folder, TreeGRPOTrainer, TreeGRPOConfig, **TWO_PASSES, **config)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def one_step(trainer: Any, inputs: dict[str, Any], drawn: Drawn | None = None) -> Step:
    """One micro-step. drawn: what the selection draws."""
    trainer._buffered_inputs, trainer._step = [inputs], trainer.args.steps_per_generation
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        if drawn is not None:
            patch.setattr(tokens, "draw", lambda *_, **__: drawn)
        loss = trainer._compute_loss(trainer.model, trainer._prepare_inputs([]))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if not name.startswith("dta/")}
    return loss.item(), gradient, metrics


def whole(model: str, folder: Path, config: dict[str, Any], **options: Any) -> Step:
    """One micro-step on all tokens."""
    trainer = trainer_of(model, folder, **config)
    return one_step(trainer, rows(trainer, **options))


def average(trainer: Any, change: Callable[[Drawn], Drawn] = lambda drawn: drawn) -> Step:
    """Mean loss, gradient and metrics over every drawing."""
    config = tree_config(trainer.args)
    selection = config and config.selection()
    assert selection is not None
    inputs = rows(trainer)
    carries = (inputs["completion_mask"] * inputs["tool_mask"] != 0).numpy()
    loss, gradient, metrics = 0.0, torch.zeros(()), dict[str, float]()
    for drawn, probability in drawings(selection, carries):
        values = one_step(trainer, inputs, change(drawn))
        loss += probability * values[0]
        gradient = gradient + probability * values[1]
        for name, value in values[2].items():
            metrics[name] = metrics.get(name, 0.0) + probability * value
    return loss, gradient, metrics


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_average_is_all_tokens(model: str, tmp_path: Path, loss_type: str, scheme: str) -> None:
    """Loss, gradient, and the metrics that are means over tokens; with KL and entropy bonus."""
    config = {"loss_type": loss_type, "beta": 0.3, "entropy_coef": 0.2}
    loss, gradient, metrics = whole(model, tmp_path, config)
    found = average(trainer_of(model, tmp_path, **config, **SCHEMES[scheme]))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert apart(found[1], gradient) < 1e-5
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        if name in metrics:
            assert found[2][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_single_terms(model: str, tmp_path: Path, loss_type: str, terms: str) -> None:
    config = {"loss_type": loss_type, **TERMS[terms]}
    loss, gradient, _ = whole(model, tmp_path, config)
    found = average(trainer_of(model, tmp_path, **config, **SCHEMES["rpc"]))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert apart(found[1], gradient) < 1e-5


def self_normalised(drawn: Drawn) -> Drawn:
    """Weights that add up to the number of tokens in every drawing."""
    counts = drawn.carries_loss.sum(axis=1, keepdims=True)
    return replace(drawn, weights=drawn.weights * counts / drawn.weights.sum(axis=1, keepdims=True))


def unweighted(drawn: Drawn) -> Drawn:
    return replace(drawn, weights=(drawn.weights > 0).astype(float))


def first_half(drawn: Drawn) -> Drawn:
    """The same prefix every time."""
    counts = drawn.carries_loss.sum(axis=1, keepdims=True)
    kept = drawn.carries_loss & (np.cumsum(drawn.carries_loss, axis=1) <= counts / 2)
    return replace(drawn, weights=kept / 0.5)


@pytest.mark.parametrize("wrong", [self_normalised, unweighted, first_half])
def test_wrong_weights_are_seen(model: str, tmp_path: Path, wrong: Callable[[Drawn], Drawn]) -> None:
    _, gradient, _ = whole(model, tmp_path, {"loss_type": "grpo"})
    found = average(trainer_of(model, tmp_path, loss_type="grpo", **SCHEMES["rpc"]), wrong)
    assert apart(found[1], gradient) > 0.1


def test_dense_path_is_weighted_too(model: str, tmp_path: Path) -> None:
    """Where the tree does not run, the selection still counts; it only saves nothing."""
    config = {"loss_type": "grpo", "beta": 0.3}
    loss, gradient, _ = whole(model, tmp_path, config)
    trainer = trainer_of(model, tmp_path, **config, **SCHEMES["rpc"], dta_min_saving=0.99)
    found = average(trainer)
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert apart(found[1], gradient) < 1e-5
    assert trainer._metrics["train"]["dta/dense_fallback"] == [1.0]


@pytest.mark.parametrize(
    "scheme,option",
    [
        *((scheme, {"dta_token_budget": 1.0}) for scheme in ("rpc", "urs", "rpc-uniform", "rpc-two-point")),
        ("rpc", {"dta_token_min_prefix": 64}),
        ("urs", {"dta_token_min_prefix": 64}),
    ],
)
def test_all_tokens_are_the_baseline(model: str, tmp_path: Path, scheme: str, option: dict[str, Any]) -> None:
    """Bit by bit."""
    config = {"beta": 0.1, "num_iterations": 2, "max_steps": 2}
    baseline = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **config)
    found = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **config, dta_token_selection=scheme, **option)
    assert identical(baseline, found)
    assert all(entry["dta/kept_fraction"] == 1 for entry in found.dta)


@pytest.mark.parametrize("merge", ["never", "always"])
def test_training_runs_on_half_the_tokens(model: str, tmp_path: Path, merge: str) -> None:
    """Several steps, two passes over each generation, windows of two micro-batches; merged windows draw the same."""
    config = {
        "num_iterations": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "dta_token_selection": "rpc",
        "dta_prune": "never",
        "dta_regroup": "never",
    }
    run = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **config, dta_merge_window=merge)
    again = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **config, dta_merge_window=merge)
    assert identical(run, again), "the same seed draws the same"
    kept = [entry["dta/kept_fraction"] for entry in run.dta]
    assert 0.3 < np.mean(kept) < 0.8 and len(set(kept)) > 2, "drawings differ between passes"
    assert all(entry["dta/pruned_tokens"] > 0 for entry in run.dta)
    assert all(1.0 <= entry["dta/max_weight"] <= 2.5 + 1e-6 for entry in run.dta)
    assert all(0.0 < entry["dta/predicted_variance"] <= 1.5 + 1e-6 for entry in run.dta)
    if merge == "always":
        apart_runs = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **config, dta_merge_window="never")
        assert run.dta[0]["dta/kept_fraction"] == apart_runs.dta[0]["dta/kept_fraction"]
        assert run.metrics[0]["grad_norm"] == pytest.approx(apart_runs.metrics[0]["grad_norm"], rel=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "importance_sampling_level='sequence'": {"importance_sampling_level": "sequence"},
    "loss_type='vespo'": {"loss_type": "vespo"},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.5},
    "top_entropy_quantile=0.5": {"top_entropy_quantile": 0.5},
    "adaptive entropy control": {"use_adaptive_entropy": True, "entropy_target": 5.0},
}


@pytest.mark.parametrize("named", REFUSED)
def test_objectives_that_are_no_sums_over_tokens_raise(model: str, tmp_path: Path, named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"token_selection='rpc' with {named}"):
        train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **REFUSED[named], dta_token_selection="rpc")


def test_rloo_raises(model: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="ratio is one of whole sequences"):
        train(model, tmp_path, TreeRLOOTrainer, TreeRLOOConfig, dta_token_selection="rpc")


def test_a_loss_of_its_own_raises(model: str, tmp_path: Path) -> None:
    class Own(TreeGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return super()._compute_loss(model, inputs)

    with pytest.raises(InvalidInputError, match=r"since Own\._compute_loss comes from tests\."):
        train(model, tmp_path, Own, TreeGRPOConfig, dta_token_selection="urs")


def test_gaps_in_a_completion_mask_raise(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, **SCHEMES["urs"], loss_type="grpo")
    inputs = rows(trainer)
    inputs["completion_mask"][1, 2] = 0
    with pytest.raises(InvalidInputError, match="gaps"):
        one_step(trainer, inputs)
