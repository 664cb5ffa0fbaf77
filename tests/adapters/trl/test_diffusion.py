"""DiffusionGRPOTrainer's gradients and losses, through real training, equal formulas computed anew in one graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.adapters.trl import diffusion as tiny

# Rotary embeddings and length scales are float32 in a float64 model, too.
TOLERANCE = 1e-6
OFF_POLICY = {"num_iterations": 2}
CASES: dict[str, dict[str, Any]] = {
    "bgpo": {},
    "bgpo, one sample": {"num_elbo_samples": 1},
    "t form": {"mask_form": "t", "stratified_masks": False, "length_norm": "none"},
    "coupled": {"coupled_masks": True, "length_norm": "max_length"},
    "two passes": OFF_POLICY,
    "two passes, whole groups": {**OFF_POLICY, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "two steps per generation": {"steps_per_generation": 4},
    "clips": {**OFF_POLICY, "bound_clip": 0.003, "dual_clip": 1.005},
    "reference": {**OFF_POLICY, "beta": 0.5},
    "fillers": {**OFF_POLICY, "score_fillers": True},
    "truncated completions masked": {
        **OFF_POLICY,
        "mask_truncated_completions": True,
        "max_completion_length": 24,
        "block_length": 8,
    },
    "checkpointing": {**OFF_POLICY, "gradient_checkpointing": True},
    "trajectory": {"objective": "trajectory", "num_elbo_samples": 2},
    "trajectory, every step": {"objective": "trajectory", "length_norm": "max_length", "max_completion_length": 16},
    "trajectory, two passes": {"objective": "trajectory", **OFF_POLICY, "num_elbo_samples": 3, "beta": 0.5},
    "trajectory, clips": {"objective": "trajectory", **OFF_POLICY, "epsilon": 0.003, "length_norm": "none"},
    "trajectory, two steps per generation": {"objective": "trajectory", "steps_per_generation": 4},
    "trajectory, ends within blocks": {
        **OFF_POLICY,
        "objective": "trajectory",
        "mask_truncated_completions": True,
        "max_completion_length": 48,
        "block_length": 16,
        "num_elbo_samples": 6,
        "gradient_checkpointing": True,
    },
    "gdsd": {"objective": "gdsd"},
    "gdsd, two passes": {"objective": "gdsd", **OFF_POLICY, "beta": 0.5, "advantage_scale": 0.05},
    "gdsd, clips": {"objective": "gdsd", **OFF_POLICY, "epsilon": 0.03, "mask_form": "t"},
    "gdsd, two steps per generation": {"objective": "gdsd", "steps_per_generation": 4, "coupled_masks": True},
    "gdsd, ends": {
        **OFF_POLICY,
        "objective": "gdsd",
        "epsilon": 0.9,
        "mask_truncated_completions": True,
        "max_completion_length": 24,
        "block_length": 8,  # with one block of 24 no completion ends
        "gradient_checkpointing": True,
    },
    "vrpo": {"objective": "vrpo"},
    "vrpo, two passes": {"objective": "vrpo", **OFF_POLICY, "beta": 0.5},
    "diffu-grpo": {"objective": "diffu-grpo", "num_elbo_samples": 16},
    "diffu-grpo, two passes": {"objective": "diffu-grpo", "num_elbo_samples": 16, **OFF_POLICY, "beta": 0.5},
    "diffu-grpo, clips": {"objective": "diffu-grpo", "num_elbo_samples": 16, **OFF_POLICY, "epsilon": 0.003},
}


def run(output: Path, **config: Any) -> tuple[Any, tiny.Recorder, tiny.Check]:
    policy = tiny.model()
    blank = copy.deepcopy(policy)
    trainer = tiny.trainer(output, policy, **{"max_steps": 4, **config})
    return trainer, tiny.recorded(trainer), tiny.Check(trainer.args, blank)


@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_the_formulas_in_one_graph(case: str, tmp_path: Path) -> None:
    trainer, recorder, check = run(tmp_path, **CASES[case])
    assert len(recorder.steps) == 4
    for number, step in enumerate(recorder.steps):
        loss, gradients = check.gradients(recorder, number)
        assert tiny.largest_difference(gradients, step.gradients) < TOLERANCE
        assert step.reported == pytest.approx(loss, abs=1e-7)
    logged = trainer.state.log_history
    if "clips" in case:
        assert max(entry.get("diffusion/clip_fraction", 0.0) for entry in logged) > 0
    if "num_iterations" in CASES[case]:
        assert max(entry.get("diffusion/max_abs_d", 0.0) for entry in logged) > 1e-4


@pytest.mark.parametrize("objective", ["bgpo", "trajectory", "gdsd", "vrpo", "diffu-grpo"])
def test_other_masks_give_another_gradient(objective: str, tmp_path: Path) -> None:
    """Negative control of the comparison above."""
    options = {"diffu-grpo": {"num_elbo_samples": 16}, "trajectory": {"num_elbo_samples": 1}}.get(objective, {})
    _, recorder, check = run(tmp_path, objective=objective, max_steps=1, **options)
    check.seed_shift = 1
    _, gradients = check.gradients(recorder, 0)
    assert tiny.largest_difference(gradients, recorder.steps[0].gradients) > 1e-2


def test_the_old_policy_is_the_one_that_generated(tmp_path: Path) -> None:
    """First pass: stored terms are the policy's own, to rounding, after shuffling and splitting. Second: they differ;
    with the current policy in their place the gradient would be another."""
    trainer, recorder, check = run(tmp_path, num_iterations=2, max_steps=2)
    assert all("old_per_token_logps" in batch for step in recorder.steps for batch in step.micro_batches)
    sizes = [entry["diffusion/max_abs_d"] for entry in trainer.state.log_history if "loss" in entry]
    assert sizes[0] < 1e-9 and sizes[1] > 1e-4
    seeds = [sorted(torch.cat([b["mask_seeds"] for b in step.micro_batches]).tolist()) for step in recorder.steps]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 8
    recorder.generators[-1] = recorder.steps[1].before
    _, gradients = check.gradients(recorder, 1)
    assert tiny.largest_difference(gradients, recorder.steps[1].gradients) > 1e-6


def test_on_policy_nothing_is_stored(tmp_path: Path) -> None:
    _, recorder, _ = run(tmp_path, max_steps=1)
    assert all("old_per_token_logps" not in batch for batch in recorder.steps[0].micro_batches)
    assert all(batch["mask_seeds"].shape == (4,) for batch in recorder.steps[0].micro_batches)


@pytest.mark.parametrize("objective", ["bgpo", "trajectory", "gdsd", "vrpo"])
def test_gradients_are_reduced_once_per_optimizer_step(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All backward passes but the last micro-batch's last run without reduction, in contexts that are never nested:
    of FSDP2's an inner one would end the outer one."""
    trainer = tiny.trainer(tmp_path, objective=objective, max_steps=2)
    log: list[str] = []
    backward = trainer.accelerator.backward

    @contextmanager
    def no_sync(model: torch.nn.Module) -> Iterator[None]:
        log.append("(")
        yield
        log.append(")")

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda *args, **kwargs: log.append(".") or backward(*args))
    trainer.train()
    assert "".join(log) == {"vrpo": "(.)()."}.get(objective, "(....)(...).") * 2


@pytest.mark.parametrize(
    ("objective", "reentrant"), [("bgpo", None), ("bgpo", False), ("bgpo", True), ("trajectory", None), ("gdsd", False)]
)
def test_lora(objective: str, reentrant: bool | None, tmp_path: Path) -> None:
    """The reference is the model without its adapters; only they are trained; checkpointing changes nothing."""
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    policy = get_peft_model(tiny.model(), lora).double()
    blank = copy.deepcopy(policy)
    options: dict[str, Any] = {"objective": objective, "beta": 0.5, "num_iterations": 2, "max_steps": 2}
    options["gradient_checkpointing"] = reentrant is not None
    if reentrant is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    trainer = tiny.trainer(tmp_path, policy, **options)
    recorder = tiny.recorded(trainer)
    check = tiny.Check(trainer.args, blank)
    for number, step in enumerate(recorder.steps):
        step.before = {n: w for n, w in step.before.items() if ".ref." not in n}
        _, gradients = check.gradients(recorder, number)
        assert all("lora_" in name for name in step.gradients)
        assert tiny.largest_difference(gradients, step.gradients) < TOLERANCE


def test_peft_config_starts_at_its_reference(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        tiny.model(torch.float32),
        trainer_options={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        beta=0.5,
        learning_rate=0.5,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert steps[0]["diffusion/kl"] < 1e-10 < steps[-1]["diffusion/kl"]
