"""Whole runs of DiffusionGRPOTrainer: learning, memory, generation, evaluation, checkpoints."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback, set_seed

from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dta_plugin.diffusion import bidirectional, family_of, load_diffusion_lm
from tests.adapters.trl import diffusion as tiny
from tests.adapters.trl.support import GEOMETRY, prompts, tokenizer
from tests.support.saved import SavedBytes

EOS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A diffusion LM on disk, with its tokenizer; its config says which token is the mask."""
    folder = tmp_path_factory.mktemp("diffusion")
    tokenizer().save_pretrained(folder)
    set_seed(0)
    config = bidirectional(Qwen3Config(**GEOMETRY | {"initializer_range": 0.05}), mask_token_id=tiny.MASK)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def wants_w7(completions: list[str], **_: Any) -> list[float]:
    return [text.split().count("w7") / 6 for text in completions]


OWN: dict[str, Any] = {"mask_token_id": None, "is_shifted": None}
LEARNING: dict[str, Any] = OWN | {
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "adam_epsilon": 1e-8,
}


@pytest.mark.parametrize("objective", ["bgpo", "trajectory", "gdsd", "vrpo", "diffu-grpo"])
def test_a_tiny_model_learns_a_toy_reward(objective: str, checkpoint: str, tmp_path: Path) -> None:
    samples = {} if objective == "diffu-grpo" else {"num_elbo_samples": 2}
    options = LEARNING | samples | ({"num_elbo_samples": 16} if objective == "diffu-grpo" else {})
    trainer = tiny.trainer(
        tmp_path, checkpoint, trainer_options={"reward_funcs": wants_w7}, max_steps=100, objective=objective, **options
    )

    class StopWhenLearned(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            control.should_training_stop |= logs.get("reward", 0.0) > 0.95

    trainer.add_callback(StopWhenLearned())
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.2 and rewards[-1] > 0.9, rewards


def peak_bytes(checkpoint: str, output: Path, objective: str, samples: int) -> int:
    """Most bytes that are saved for backward at once in two training steps."""
    trainer = tiny.trainer(
        output, checkpoint, **OWN, objective=objective, num_elbo_samples=samples, max_steps=2, num_iterations=2
    )
    saved = SavedBytes(trainer.model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        trainer.train()
    gc.collect()
    return saved.peak


def test_memory_does_not_grow_with_the_samples(checkpoint: str, tmp_path: Path) -> None:
    """With stratified levels the scored tokens of one sample vary; the graph of vrpo is linear in the samples."""
    bound, steps, distances = (
        {n: peak_bytes(checkpoint, tmp_path, objective, n) for n in (2, 16)}
        for objective in ("bgpo", "trajectory", "gdsd")
    )
    graph = {n: peak_bytes(checkpoint, tmp_path, "vrpo", n) for n in (2, 8)}
    assert max(bound.values()) / min(bound.values()) < 1.1
    assert max(distances.values()) / min(distances.values()) < 1.1
    assert max(steps.values()) / min(steps.values()) < 1.05
    assert graph[8] > 3 * graph[2] and graph[2] > 1.5 * bound[2]


def test_rows_without_advantage_are_not_run(checkpoint: str, tmp_path: Path) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    calls: list[int] = []
    trainer = tiny.trainer(tmp_path, checkpoint, trainer_options={"reward_funcs": constant}, **OWN, max_steps=2)
    term = trainer.objective.term
    trainer.objective.term = lambda *args: calls.append(1) or term(*args)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert not calls
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    entry = trainer.state.log_history[0]
    assert (entry["loss"], entry["diffusion/rows_kept"], entry["diffusion/rows_skipped"]) == (0.0, 0.0, 4.0)


def test_a_gradient_scaler_sees_a_gradient_in_a_step_without_advantages(checkpoint: str, tmp_path: Path) -> None:
    """fp16 in one process: a scaler raises in an optimizer step in which no parameter has a gradient."""

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = tiny.trainer(tmp_path, checkpoint, trainer_options={"reward_funcs": constant}, **OWN, max_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("score_fillers", [False, True])
def test_what_is_generated(score_fillers: bool, checkpoint: str, tmp_path: Path) -> None:
    """No mask token; up to the first end token, or the whole canvas; the same again from the same seed."""
    options = OWN | {"score_fillers": score_fillers, "max_completion_length": 32, "remasking": "random"}
    trainer = tiny.trainer(tmp_path, checkpoint, **options)
    batch = [[5, 6, 7], [8], [9, 10, 11, 12]] * 8
    torch.manual_seed(3)
    completions, _ = trainer._generate_single_turn(batch, None, {})
    torch.manual_seed(3)
    assert trainer._generate_single_turn(batch, None, {})[0] == completions
    assert trainer._generate_single_turn(batch, None, {})[0] != completions
    assert len(completions) == 24 and not any(tiny.MASK in row for row in completions)
    ended = [row for row in completions if EOS in row]
    assert ended
    for row in ended:
        after = row[row.index(EOS) + 1 :]
        assert after == [EOS] * len(after) and (len(row) == 32 if score_fillers else not after)


def test_evaluation(checkpoint: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        checkpoint,
        trainer_options={"eval_dataset": prompts(4)},
        **OWN,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        beta=0.1,
    )
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and all(entry["eval_diffusion/elbo"] < 0 for entry in found)
    assert all(entry["eval_diffusion/model_calls"] > 0 and entry["eval_diffusion/kl"] >= 0 for entry in found)


def test_evaluation_at_its_own_temperature_and_length(checkpoint: str, tmp_path: Path) -> None:
    own = {"eval_temperature": 0.0, "eval_max_completion_length": 16}
    trainer = tiny.trainer(tmp_path, checkpoint, **OWN, **own, max_completion_length=8)
    batch = [[5, 6, 7], [8], [9, 10, 11, 12]]
    trainer.model.eval()
    cold = trainer._generate_single_turn(batch, None, {})[0]
    assert cold == trainer._generate_single_turn(batch, None, {})[0] and max(map(len, cold)) > 8
    trainer.model.train()
    warm = [trainer._generate_single_turn(batch, None, {})[0] for _ in range(2)]
    assert warm[0] != warm[1] and max(len(row) for rows in warm for row in rows) <= 8


def test_saves_loads_and_resumes(checkpoint: str, tmp_path: Path) -> None:
    """Half a run, resumed, ends with the weights of the whole one: noise and completions come from restored seeds."""
    options = OWN | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = tiny.trainer(tmp_path, checkpoint, **options)
    whole.train()
    resumed = tiny.trainer(tmp_path, checkpoint, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, dict(resumed.model.named_parameters())[name]), name
    loaded = load_diffusion_lm(tmp_path / "checkpoint-4")
    assert family_of(loaded.config).mask_token_id == tiny.MASK
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name)), name


def test_a_block_diffusion_model(tmp_path: Path) -> None:
    """Its attention blocks are the sampler's; prompts end within a block."""
    trainer = tiny.trainer(tmp_path, attention_block_length=4, max_steps=1)
    assert trainer.family.block_length == trainer.sampler.block_length == 4
    recorder = tiny.recorded(trainer)
    assert max(float(g.abs().max()) for g in recorder.steps[0].gradients.values()) > 1e-4


def test_bfloat16_autocast(checkpoint: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, checkpoint, **OWN, bf16=True, max_steps=2, num_iterations=2)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["grad_norm"] > 0 and entry["diffusion/max_abs_d"] < 0.05


def test_images_are_refused(checkpoint: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, checkpoint, **OWN)
    with pytest.raises(ValueError, match="images"):
        trainer._generate_single_turn([[5]], [["picture"]], {})


def test_a_checkpoint_needs_only_its_name(checkpoint: str, tmp_path: Path) -> None:
    """Model, tokenizer and family all come from the folder; the dtype from model_init_kwargs."""
    args = DiffusionGRPOConfig(
        output_dir=str(tmp_path),
        model_init_kwargs={"dtype": "bfloat16"},
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_completion_length=32,
    )
    trainer = DiffusionGRPOTrainer(checkpoint, wants_w7, args, train_dataset=Dataset.from_dict({"prompt": ["w5"] * 8}))
    assert trainer.model.dtype is torch.bfloat16 and trainer.family.mask_token_id == tiny.MASK
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert (trainer.sampler.block_length, trainer.sampler.calls_per_block) == (32, 16)
