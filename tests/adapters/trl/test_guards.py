"""Where the tree would not be exact or would not pay: errors, the dense path, verification, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType
from transformers import GPT2Config, MiniMaxConfig, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

import dta_plugin
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeTrainerMixin
from dta_plugin.errors import VerificationError
from tests.adapters.trl.support import GEOMETRY, HOOK, assert_equal, build, identical, moved, save_model, train
from tests.support.tree_run import make_siblings_visible

GPT2 = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
UNSUPPORTED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "linear_attention": (
        MiniMaxConfig(**GEOMETRY, layer_types=["linear_attention", "full_attention"], num_local_experts=2),
        {},
        "MiniMaxForCausalLM has linear_attention layers, whose state would run across branches",
        "use a model with full or sliding-window attention only",
    ),
    "absolute_positions": (
        GPT2Config(**{k: GEOMETRY[k] for k in GEOMETRY if k.endswith("id") or k == "vocab_size"}, **GPT2),
        {},
        "GPT2LMHeadModel has no rotary positions",
        "use a rotary model",
    ),
    "attention_dropout": (
        Qwen3Config(**GEOMETRY, attention_dropout=0.1),
        {},
        "attention_dropout is 0.1",
        "set attention_dropout=0",
    ),
    "prompt_tuning": (
        None,
        {"trainer_options": {"peft_config": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)}},
        "PROMPT_TUNING adds virtual tokens",
        "use LoRA or full fine-tuning",
    ),
}
SPREAD = {"steps_per_generation": 4, "gradient_accumulation_steps": 2}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the plugin has logged since the last call."""

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "dta_plugin"]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield messages


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models(model: str, tmp_path: Path, said: Callable[[], list[str]], name: str) -> None:
    config, options, what, remedy = UNSUPPORTED[name]
    chosen = model if config is None else save_model(tmp_path / name, config=config)
    with pytest.raises(dta_plugin.UnsupportedError) as error:
        train(chosen, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **options)
    for part in ("Prefix-tree execution is not exact here", what, remedy, "or on_unsupported='dense'"):
        assert part in str(error.value)

    stock = train(chosen, tmp_path, GRPOTrainer, GRPOConfig, **SPREAD, **options)
    run = train(chosen, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_on_unsupported="dense", **SPREAD, **options)
    assert identical(run, stock) and moved(run) > 1e-3
    assert [entry for entry in run.dta if entry != {"dta/dense_fallback": 1.0}] == []
    assert [what in message for message in said()] == [True, True], "when it is found, and at the end"


class LigerTrainer(GRPOTrainer):
    """TRL up to 1.13 with use_liger_kernel=True: the loss does not come through the log-prob hook."""

    use_liger_kernel = True

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        return self.compute_liger_loss(self.accelerator.unwrap_model(model), inputs)

    def compute_liger_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, *_ = getattr(GRPOTrainer, HOOK)(self, model, ids, mask, inputs["completion_ids"].shape[1])
        return -(logps.sum(dim=1) * inputs["advantages"]).mean()


class TreeLigerTrainer(TreeTrainerMixin, LigerTrainer):
    pass


@pytest.mark.usefixtures("unprobed")
def test_fused_loss(model: str, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    with pytest.raises(dta_plugin.UnsupportedError, match=r"Liger loss bypasses.*use_liger_kernel=False.*dense"):
        train(model, tmp_path, TreeLigerTrainer, TreeGRPOConfig)
    stock = train(model, tmp_path, LigerTrainer, GRPOConfig, **SPREAD)
    run = train(model, tmp_path, TreeLigerTrainer, TreeGRPOConfig, dta_on_unsupported="dense", **SPREAD)
    assert identical(run, stock) and moved(run) > 1e-3
    assert [entry["dta/dense_fallback"] for entry in run.dta] == [1.0] * 3
    assert ["Liger loss bypasses" in message for message in said()] == [True]


def score(trainer: Any, trainer_class: type = TreeGRPOTrainer, empty_prompt: bool = False, **inputs: Any) -> Any:
    """Call the hook as `_compute_loss` does: 4 rows, 3 prompt and 4 completion tokens."""
    trainer.model.train()
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10 + i] for i in range(4)])
    mask = (ids > 0).long()
    if empty_prompt:
        mask[2, :3] = 0
    return getattr(trainer_class, HOOK)(trainer, trainer.model, ids, mask, 4, compute_entropy=True, **inputs)


def test_image_inputs(model: str, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    images = {"pixel_values": torch.ones(4, 3, 8, 8), "num_images": [1, 1, 1, 1]}
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig)
    with pytest.raises(
        dta_plugin.UnsupportedError, match=r"has no image token in its config.*; use a vision-language model.*; or on"
    ):
        score(trainer, **images)
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_on_unsupported="dense")
    types = {"token_type_ids": torch.zeros(4, 7, dtype=torch.int64)}  # what Qwen3 takes without an image tower
    for _ in range(2):
        logps, entropies, _ = score(trainer, **types)
    expected = score(trainer, GRPOTrainer, **types)
    assert torch.equal(logps, expected[0]) and torch.equal(entropies, expected[1])
    assert trainer._metrics["train"]["dta/dense_fallback"] == [1.0, 1.0]
    assert ["the batch has token_type_ids" in message for message in said()] == [True]


def test_too_little_saving(model: str, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    stock = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    run = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_min_saving=0.9, dta_prune="never")
    assert identical(run, stock) and moved(run) > 1e-2
    assert run.dta == [{"dta/dense_fallback": 1.0}] * 3
    message, idle = said()
    assert "dense path: only" in message and "min_saving 90%" in message and "use_dta did nothing" in idle


@pytest.mark.usefixtures("unprobed")
def test_one_report_per_trainer(model: str, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    run = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, num_iterations=2, beta=0.04, dta_min_saving=0.1)
    message, end = said()
    assert "8 sequences" in message and "packed on cpu" in message and "min_saving 10%" in message
    assert "in this training: 3 trees" in end
    names = {
        "dense_fallback",
        "flat_tokens",
        "tree_tokens",
        "compression_ratio",
        "flops_ceiling",
        "chunks",
        "recomputed_tokens",
        "pruned_tokens",
        "duplicated_prefix_tokens",
    }
    assert [set(entry) for entry in run.dta] == [{f"dta/{name}" for name in names}] * 3
    for entry in run.dta:
        assert entry["dta/compression_ratio"] == pytest.approx(entry["dta/flat_tokens"] / entry["dta/tree_tokens"])


@pytest.mark.parametrize(("verify", "calls"), [("every:2", [0, 2, 4]), ("first", [0])])
def test_verification_passes(
    model: str, tmp_path: Path, said: Callable[[], list[str]], verify: str, calls: list[int]
) -> None:
    """Old and reference passes count as calls, too; verifying changes nothing."""
    options = {"num_iterations": 2, "max_steps": 4}  # 2 passes for old log-probs, 4 for the policy
    plain = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **options)
    said()
    run = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_verify=verify, **options)
    verified = [message for message in said() if "verified against dense" in message]
    assert [int(message.split("call ")[1].split()[0]) for message in verified] == calls
    assert identical(run, plain)
    assert_equal(train(model, tmp_path, GRPOTrainer, GRPOConfig, **options), run)


@pytest.mark.usefixtures("unprobed")
def test_verification_finds_a_wrong_mask(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_siblings_visible(monkeypatch)
    with pytest.raises(VerificationError, match="Tree and dense log-probs differ from layer 0 on"):
        train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_verify="every:2")


def test_broken_weights(model: str, tmp_path: Path) -> None:
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig)
    with torch.no_grad():
        trainer.model.lm_head.weight[7] = float("nan")
    with pytest.raises(dta_plugin.InvalidInputError, match=r"NaN or infinite log-probs.*Expected finite.*check"):
        score(trainer)


def test_row_without_a_prompt(model: str, tmp_path: Path) -> None:
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig)
    with pytest.raises(dta_plugin.InvalidInputError, match=r"Row 2 has no prompt token\. Expected at least one"):
        score(trainer, empty_prompt=True)
