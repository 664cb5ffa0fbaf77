"""Tiny real trainers: a model and tokenizer built on disk, a deterministic reward, and training runs to compare.

`dense_and_tree` trains twice with the same seeds, `assert_equal` says that nothing differs and that the comparison
means something. Runs are float32 with AdamW, TRL's default, but with a larger epsilon: a weight whose gradient is
nothing but rounding (1e-8) takes a full step in either direction under epsilon=1e-8. Measured: one such weight in
1280 is 1e-4 off where no other is 2e-6 off (and stock padded differently is as far from stock); not so with SGD.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import dta_plugin
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer

VOCABULARY = 40
TOLERANCE = 1e-5
HOOK = "_get_per_token_logps_and_entropies"
GEOMETRY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Three small steps on a CPU, seeded, with nothing written.
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 9,
    "max_steps": 3,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 11,
}
# Metrics that measure time or that only the plugin writes.
NOT_COMPARED = ("time", "runtime", "perf/", "per_second", "dta/", "total_flos", "epoch", "step")

LORA = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")

Model = str | Callable[[], PreTrainedModel]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; its chat template wraps every message in a word of its own."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    turns = "{% for message in messages %}w9 {{ message['content'] }} {% endfor %}"
    outer.chat_template = turns + "{% if add_generation_prompt %}w10{% endif %}"
    return outer


def save_model(folder: Path, moe: bool = False, config: PretrainedConfig | None = None) -> str:
    """A random Qwen3 (or Qwen3-MoE, or model of the given config) and its tokenizer; returns the folder's name."""
    if config is None:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = Qwen3MoeConfig(**GEOMETRY, **experts) if moe else Qwen3Config(**GEOMETRY)
    tokenizer().save_pretrained(folder)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def prompts(count: int = 16, words: int = 14, conversational: bool = False) -> Dataset:
    """Prompts of different lengths that share a beginning."""
    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        length = words - i % 5
        own = torch.randint(3, VOCABULARY, (length - 4,), generator=generator).tolist()
        text = " ".join(f"w{t}" for t in [5, 6, 7, 8, *own])
        rows.append({"prompt": [{"role": "user", "content": text}] if conversational else text})
    return Dataset.from_list(rows)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Share of even words, a function of the text alone."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in texts]
    return [sum(w % 2 == 0 for w in row) / (len(row) + 1) for row in words]


@dataclass
class Run:
    """What a training run leaves: metrics of every log entry (evaluations too), trainable weights before and after."""

    metrics: list[dict[str, float]]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    dta: list[dict[str, float]]


def build(
    model: Model,
    output: Path,
    trainer_class: type,
    config_class: type,
    trainer_options: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer with fixed seeds. trainer_options: further arguments of the trainer, config: of its config."""
    args = config_class(**{**TRAINING, "output_dir": str(output), **config})
    set_seed(11)
    options = {"reward_funcs": reward, "train_dataset": prompts()} | (trainer_options or {})
    trainer = trainer_class(model=model if isinstance(model, str) else model(), args=args, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    model: Model,
    output: Path,
    trainer_class: type,
    config_class: type,
    prepare: Callable[[Any], None] = lambda trainer: None,
    trainer_options: dict[str, Any] | None = None,
    **config: Any,
) -> Run:
    """Train for a few steps with fixed seeds. prepare: called with the trainer before training starts."""
    trainer = build(model, output, trainer_class, config_class, trainer_options, **config)
    prepare(trainer)
    start = trainable(trainer.model)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return Run(
        [{k: v for k, v in entry.items() if not any(part in k for part in NOT_COMPARED)} for entry in steps],
        start,
        trainable(trainer.model),
        [{k: v for k, v in entry.items() if k.startswith("dta/")} for entry in steps if "loss" in entry],
    )


def dense_and_tree(
    model: Model,
    output: Path,
    trainers: tuple[type, type] = (GRPOTrainer, TreeGRPOTrainer),
    configs: tuple[type, type] = (GRPOConfig, TreeGRPOConfig),
    dta: dict[str, Any] | None = None,
    **run: Any,
) -> tuple[Run, Run]:
    """The same training stock and as a tree, where every pass must be one. dta: options of the second only."""
    dense = train(model, output, trainers[0], configs[0], **run)
    with no_dense_pass(trainers[0]):
        return dense, train(model, output, trainers[1], configs[1], **run, **(dta or {}))


@contextmanager
def enabled(**options: Any) -> Iterator[None]:
    """TRL's own trainers use the tree within the context."""
    dta_plugin.enable(**options)
    try:
        yield
    finally:
        dta_plugin.disable()


@contextmanager
def no_dense_pass(trainer_class: type) -> Iterator[None]:
    """Within the context the trainer's own log-prob method raises; it still counts as TRL's, by its globals."""
    owner = next(base for base in trainer_class.__mro__ if HOOK in base.__dict__)

    def refuses(*_: Any, **__: Any) -> None:
        raise AssertionError("a dense pass ran where a tree was expected")

    globals_of_trl = vars(sys.modules[owner.__module__])
    forbidden = functools.wraps(owner.__dict__[HOOK])(types.FunctionType(refuses.__code__, globals_of_trl))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, HOOK, forbidden)
        yield


def difference(a: Run, b: Run, ignore: tuple[str, ...] = ()) -> float:
    """Largest relative difference over all logged metrics and final weights (relative to 1 for small metrics)."""
    assert [set(m) for m in a.metrics] == [set(m) for m in b.metrics], "different metrics were logged"
    worst = weight_difference(a, b)
    pruned = any(entry.get("dta/pruned_tokens", 0) for entry in a.dta + b.dta)
    ignore = (*ignore, "entropy") if pruned else ignore  # then it is the mean over the tokens that ran
    for left, right in zip(a.metrics, b.metrics, strict=True):
        worst = max(worst, *(_apart(value, right[key]) for key, value in left.items() if key not in ignore))
    return worst


def weight_difference(a: Run, b: Run) -> float:
    """Largest relative difference over the final weights."""
    return _distance(a.weights, b.weights)


def moved(run: Run) -> float:
    """How far training moved the weights, as `weight_difference`: what equality is to be measured against."""
    return _distance(run.start, run.weights)


def assert_equal(dense: Run, tree: Run, ignore: tuple[str, ...] = (), least_ratio: float = 1.2) -> None:
    """Metrics and weights agree to TOLERANCE, in a training that learned something and that ran as a tree."""
    worst = difference(dense, tree, ignore)
    print(f"worst difference {worst:.1e}, weights moved {moved(dense):.1e}")
    assert worst <= TOLERANCE
    assert moved(dense) > 1000 * TOLERANCE
    steps = [entry for entry in dense.metrics if "loss" in entry]
    generations = [entry for entry in steps if "reward_std" in entry]
    assert generations and all(e["reward_std"] > 0 and e["frac_reward_zero_std"] < 1 for e in generations)
    assert all(entry["grad_norm"] > 0 for entry in generations)
    assert len(tree.dta) == len(steps) and not any(dense.dta)
    assert all(entry["dta/dense_fallback"] == 0 for entry in tree.dta)
    assert all(entry["dta/compression_ratio"] > least_ratio for entry in tree.dta)


def identical(a: Run, b: Run) -> bool:
    """Whether metrics and weights are equal bit for bit."""
    return a.metrics == b.metrics and all(torch.equal(weight, b.weights[name]) for name, weight in a.weights.items())


def _apart(a: float | None, b: float | None) -> float:
    """Relative difference of two metrics; one that is missing or NaN in one run only is infinitely far."""
    if a == b or (a != a and b != b):
        return 0.0
    return math.inf if a is None or b is None or a != a or b != b else abs(a - b) / max(1.0, abs(a))


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(((weight - b[name]).norm() / weight.norm().clamp(min=1e-6)).item() for name, weight in a.items())
