"""verl's FSDP engine on a CPU: tiny models, batches as verl's workers get them, and two optimizer steps of either."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import Qwen3Config, Qwen3ForCausalLM

import dta_plugin.adapters.verl_cpu  # before verl's modules ask for the platform
from dta_plugin.adapters.verl import install  # noqa: F401  (registers the engine)
from tensordict import NonTensorStack, TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from dta_plugin.adapters.verl.engine import TreeEngine
from dta_plugin.config import TreeConfig

VOCABULARY = 64
Sequences = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One way to train. model: extra fields of HFModelConfig. config: what the tree runs with."""

    strategy: str = "fsdp2"
    shape: str = "groups"
    dynamic: bool = True
    remove_padding: bool = True
    lora: bool = False
    checkpointing: bool = True
    loss_mode: str = "vanilla"
    loss_agg_mode: str = "token-mean"
    temperature: float | str = 0.8
    budget: int = 90
    rows: int = 4
    entropy_coeff: float = 0.01
    dtype: str = "fp32"
    model: tuple[tuple[str, Any], ...] = ()
    engine: tuple[tuple[str, Any], ...] = ()
    config: TreeConfig = TreeConfig()


def _run(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


def groups(seed: int = 0) -> tuple[Sequences, list[int]]:
    """Four prompts with four responses each, not next to each other. -> sequences, prompt lengths."""
    rows = [
        (_run(20 + prompt, 1000 * seed + prompt) + _run(3 + (5 * prompt + 3 * i) % 7, 1000 * seed + 100 + 10 * prompt + i), 20 + prompt)
        for i in range(4)
        for prompt in range(4)
    ]
    return [row for row, _ in rows], [length for _, length in rows]


def turns(seed: int = 0) -> tuple[Sequences, list[int]]:
    """Multi-turn trees: P/{A/{R0,R1}, B/{R2,R3}}, a comb whose turns end inside the tree, a duplicate."""
    prompt, a, b = (_run(9, 1000 * seed + i) for i in range(3))
    rows = [prompt + middle + _run(4 + i, 1000 * seed + 10 + i) for i, middle in enumerate((a, a, b, b))]
    comb = _run(40, 1000 * seed + 50)
    rows += [comb[:length] for length in (12, 19, 26, 33)]
    rows += [comb[:19] + _run(5, 1000 * seed + 60 + i) for i in range(3)] + [rows[0]]
    lengths = [9, 9, 9, 18, 5, 5, 19, 5, 8, 19, 8, 9]
    return rows, lengths


SHAPES = {"groups": groups, "turns": turns}


def save_model(folder: Path) -> Path:
    """A tiny random Qwen3 whose attention matters, and an adapter for it in `adapter`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():  # B starts at zero, which would hide the adapters
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder / "adapter")
    return folder


def build(case: Case, folder: Path, tree: bool, forward_only: bool = False) -> Any:
    """An initialised engine, verl's own or the plugin's."""
    model = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        use_remove_padding=case.remove_padding,
        enable_gradient_checkpointing=case.checkpointing,
        lora_rank=4 if case.lora else 0,
        lora_adapter_path=str(folder / "adapter") if case.lora else None,
        override_config={"attn_implementation": "sdpa"},
        **dict(case.model),
    )
    kinds = ("param_dtype", "reduce_dtype", "buffer_dtype")
    engine = FSDPEngineConfig(
        strategy=case.strategy,
        model_dtype="fp32",
        mixed_precision=dict.fromkeys(kinds, case.dtype),
        use_torch_compile=False,
        forward_only=forward_only,
        **dict(case.engine),
    )
    # A large eps keeps Adam's first steps near the gradient; with a small one they would know its sign only.
    optimizer = FSDPOptimizerConfig(
        lr=1e-3, total_training_steps=10, clip_grad=1e6, override_optimizer_config={"eps": 1e-2}
    )
    torch.manual_seed(1)
    kind = EngineRegistry.get_engine_cls("language_model", case.strategy) if tree else FSDPEngineWithLMHead
    found = kind(model, engine, optimizer, CheckpointConfig())
    found.initialize()
    if tree:
        assert isinstance(found, TreeEngine)
        found.configure(case.config)
    return found


def actor_config(case: Case) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy=case.strategy,
        rollout_n=4,
        use_dynamic_bsz=True,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        entropy_coeff=case.entropy_coeff,
        loss_agg_mode=case.loss_agg_mode,
        policy_loss={"loss_mode": case.loss_mode},
        fsdp_config=FSDPEngineConfig(strategy=case.strategy),
    )


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def mini_batch(case: Case, seed: int) -> TensorDict:
    """This rank's part of a mini-batch, as `TrainingWorker.train_batch` hands it to an engine."""
    sequences, begins = SHAPES[case.shape](seed)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    per_rank = len(sequences) // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    total = len(sequences)
    sequences, begins = sequences[mine], begins[mine]
    ids = [torch.tensor(sequence) for sequence in sequences]
    responses = [row[begin:] for row, begin in zip(ids, begins, strict=True)]
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    masks = [torch.ones(len(row), dtype=torch.long) for row in responses]
    for mask in masks:
        mask[1:2] = 0  # a token of a tool
    advantages = [torch.randn(1, generator=generator).expand(len(row)).clone() for row in responses]
    tensors = {
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(len(row)) for row in ids]),
        "prompts": nested([row[:begin] for row, begin in zip(ids, begins, strict=True)]),
        "responses": nested(responses),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "advantages": nested(advantages),
    }
    data = TensorDict(tensors, batch_size=[len(ids)])
    data["multi_modal_inputs"] = NonTensorStack(*[{} for _ in ids])
    temperature: Any = case.temperature
    if temperature == "per_sample":
        temperature = torch.tensor([(0.7, 1.0, 1.3)[i % 3] for i in range(len(ids))])
        data["temperature"] = temperature
    else:
        tu.assign_non_tensor(data, temperature=temperature)
    tu.assign_non_tensor(
        data,
        use_remove_padding=case.remove_padding,
        use_dynamic_bsz=case.dynamic,
        max_token_len_per_gpu=case.budget,
        micro_batch_size_per_gpu=case.rows,
        use_fused_kernels=dict(case.model).get("use_fused_kernels", False),
        calculate_entropy=True,
        global_batch_size=total,
        pad_token_id=0,
    )
    return data


def response_rows(data: TensorDict, values: torch.Tensor) -> torch.Tensor:
    """Model outputs of response tokens, as verl slices them."""
    rows = zip(values.unbind(), data["responses"].offsets().diff().tolist(), strict=True)
    return nested([row[len(row) - 1 - length : len(row) - 1] for row, length in rows])


def log_probs(engine: Any, data: TensorDict) -> dict[str, torch.Tensor]:
    with engine.eval_mode():
        return engine.infer_batch(data, loss_function=None)["model_output"]


def train(case: Case, engine: Any, steps: int = 2) -> list[dict[str, Any]]:
    """Old log-probs, reference and update for each step; what verl logs, and the log-probs themselves."""
    loss = functools.partial(ppo_loss, config=actor_config(case))
    results = []
    for step in range(steps):
        data = mini_batch(case, step)
        old = log_probs(engine, data.copy())
        data["old_log_probs"] = response_rows(data, old["log_probs"]) + 0.0
        if case.lora:
            with engine.disable_adapter():
                reference = response_rows(data, log_probs(engine, data.copy())["log_probs"])
        else:
            reference = nested([row + 0.1 * torch.sin(torch.arange(len(row))) for row in data["old_log_probs"].unbind()])
        data["ref_log_prob"] = reference
        # Old log-probs off by a little, so that ratios and clipping do something.
        data["old_log_probs"] = nested([row + 0.15 * torch.cos(torch.arange(len(row)) * 1.0) for row in data["old_log_probs"].unbind()])
        with engine.train_mode():
            output = engine.train_batch(data, loss_function=loss)
        metrics = output["metrics"]
        found = {
            "loss": sum(output["loss"]),
            "grad_norm": metrics["grad_norm"],
            "pg_loss": sum(metrics["actor/pg_loss"].values),
            "entropy": sum(metrics["actor/entropy_loss"].values),
            "kl": sum(metrics["kl_loss"].values),
            "log_probs": response_rows(data, old["log_probs"]).values(),
            "entropies": response_rows(data, old["entropy"]).values(),
            "dta": {name: value.aggregate() for name, value in metrics.items() if name.startswith("dta/")},
        }
        results.append(found)
    return results


NUMBERS = ("loss", "grad_norm", "pg_loss", "entropy", "kl")


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """The largest relative difference of two runs' numbers; of log-probs and entropies, absolute."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        for name in NUMBERS:
            worst = max(worst, abs(x[name] - y[name]) / max(abs(y[name]), 1e-6))
        for name in ("log_probs", "entropies"):
            worst = max(worst, (x[name] - y[name]).abs().max().item())
    return worst


def with_config(case: Case, **options: Any) -> Case:
    return replace(case, config=replace(case.config, **options))
