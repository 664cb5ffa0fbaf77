"""verl's FSDP engine on a CPU: tiny models, batches as verl's workers get them, and two optimizer steps of either."""

from __future__ import annotations

from dta_plugin.adapters import verl as plugin
from dta_plugin.adapters import verl_cpu  # first: verl's modules ask for the platform as they are imported

# isort: split
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tensordict import NonTensorStack, TensorDict
from torch import distributed
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers.qwen2_vl import get_rope_index
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.adapters.verl_plugin.losses import POLICY_LOSSES
from dta_plugin.config import TreeConfig

assert verl_cpu and plugin
VOCABULARY = 64
# Ids beyond those of text: a place in a picture or video, and what is around them.
PLACE, VIDEO, START, END = range(VOCABULARY, VOCABULARY + 4)
# verl 0.8 has neither the loss "dro" nor "token-sum".
ADDITIVE = {name for name, traits in POLICY_LOSSES.items() if traits.allows_moves}
ADDITIVE_LOSSES = sorted(ADDITIVE & POLICY_LOSS_REGISTRY.keys())
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
AGGREGATIONS += ["token-sum"] if "dro" in ADDITIVE_LOSSES else []
Sequences = list[list[int]]


@dataclass(frozen=True)
class Setup:
    """How an engine is built. model, engine: further fields of HFModelConfig and FSDPEngineConfig."""

    strategy: str = "fsdp2"
    lora: bool = False
    checkpointing: bool = True
    dtype: str = "fp32"
    forward_only: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One optimizer step: data, loss, and what the tree runs with. stock_budget: stock's, where it needs more.

    temperature: None for three different ones among the rows. rows: per micro-batch, if not dynamic. position_rows:
    of every sequence, as multimodal models have several.
    """

    shape: str = "groups"
    dynamic: bool = True
    remove_padding: bool = True
    temperature: float | None = 0.8
    budget: int = 90
    stock_budget: int | None = None
    rows: int = 4
    position_rows: int = 1
    loss_mode: str = "vanilla"
    loss_agg_mode: str = "token-mean"
    extra: dict[str, Any] = field(default_factory=dict)
    config: TreeConfig = field(default_factory=TreeConfig)


def text_run(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


def groups(seed: int = 0) -> tuple[Sequences, list[int]]:
    """Four prompts with four responses each, not next to each other. -> sequences, prompt lengths."""
    rows, begins = [], []
    for i in range(4):
        for prompt in range(4):
            response = text_run(3 + (5 * prompt + 3 * i) % 7, 1000 * seed + 100 + 10 * prompt + i)
            rows.append(text_run(20 + prompt, 1000 * seed + prompt) + response)
            begins.append(20 + prompt)
    return rows, begins


def turns(seed: int = 0) -> tuple[Sequences, list[int]]:
    """Multi-turn trees: P/{A/{R0,R1}, B/{R2,R3}}, a comb whose turns end inside the tree, a duplicate."""
    prompt, a, b = (text_run(9, 1000 * seed + i) for i in range(3))
    rows = [prompt + middle + text_run(4 + i, 1000 * seed + 10 + i) for i, middle in enumerate((a, a, b, b))]
    comb = text_run(40, 1000 * seed + 50)
    rows += [comb[:length] for length in (12, 19, 26, 33)]
    rows += [comb[:19] + text_run(5, 1000 * seed + 60 + i) for i in range(3)] + [rows[0]]
    lengths = [9, 9, 9, 18, 5, 5, 19, 5, 8, 19, 8, 9]
    return rows, lengths


# -> sequences, prompt lengths, and the multi_modal_inputs of rows that have any.
SHAPES: dict[str, Any] = {"groups": groups, "turns": turns}


# Of a tiny model whose attention matters.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path) -> Path:
    """A tiny random Qwen3 whose attention matters, and an adapter for it in `adapter`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SIZES,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
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


def build(setup: Setup, folder: Path, tree: bool) -> Any:
    """An initialised engine: the one that verl's registry gives, or verl's own."""
    model = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        enable_gradient_checkpointing=setup.checkpointing,
        lora_rank=4 if setup.lora else 0,
        lora_adapter_path=str(folder / "adapter") if setup.lora else None,
        **({"override_config": {"attn_implementation": "sdpa"}} | setup.model),
    )
    kinds = ("param_dtype", "reduce_dtype", "buffer_dtype")
    engine = FSDPEngineConfig(
        strategy=setup.strategy,
        model_dtype="fp32",
        mixed_precision=dict.fromkeys(kinds, setup.dtype),
        use_torch_compile=False,
        forward_only=setup.forward_only,
        **setup.engine,
    )
    # A large eps keeps Adam's first steps near the gradient; with a small one they would know its sign only.
    optimizer = FSDPOptimizerConfig(
        lr=1e-3, total_training_steps=10, clip_grad=1e6, override_optimizer_config={"eps": 1e-2}
    )
    kind = EngineRegistry.get_engine_cls("language_model", setup.strategy) if tree else FSDPEngineWithLMHead
    found = kind(model, engine, optimizer, CheckpointConfig())
    found.initialize()
    assert isinstance(found, TreeEngine) == tree
    return found


def actor_config(step: Step) -> FSDPActorConfig:
    required = {"dro_beta": 0.1} if step.loss_mode == "dro" else {}
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        use_dynamic_bsz=True,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        entropy_coeff=0.01,
        loss_agg_mode=step.loss_agg_mode,
        policy_loss=PolicyLossConfig(loss_mode=step.loss_mode, **required),
        fsdp_config=FSDPEngineConfig(strategy="fsdp2"),
    )


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def positions(ids: torch.Tensor, rows: int = 1, grid: torch.Tensor | None = None) -> torch.Tensor:
    """Of a sequence, [len], or [rows, len] as multimodal models have. grid: of its pictures, by verl's function."""
    depth = torch.arange(len(ids))
    if grid is None:
        return depth if rows == 1 else depth.repeat(rows, 1)
    names = {"<|image_pad|>": PLACE, "<|video_pad|>": VIDEO, "<|vision_start|>": START}
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2), tokenizer=SimpleNamespace(convert_tokens_to_ids=names.get)
    )
    return torch.cat([depth[None], get_rope_index(processor, ids, grid, attention_mask=torch.ones_like(ids))])


def mini_batch(
    step: Step, seed: int = 0, budget: int | None = None, share: tuple[int, int] | None = None
) -> TensorDict:
    """This rank's part of a mini-batch, as `TrainingWorker.train_batch` hands it to an engine.

    share: which part of how many, where ranks have them in common.
    """
    sequences, begins, *further = SHAPES[step.shape](seed)
    total = len(sequences)
    rank, parts = share or (distributed.get_rank(), distributed.get_world_size())
    per_rank = total // parts
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    ids = [torch.tensor(sequence) for sequence in sequences[mine]]
    pairs = list(zip(ids, begins[mine], strict=True))
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    masks = [torch.ones(len(row) - begin, dtype=torch.long) for row, begin in pairs]
    for mask, (row, begin) in zip(masks, pairs, strict=True):
        mask[1:2] = 0  # a token of a tool
        mask[row[begin:] >= VOCABULARY] = 0
    pictures: list[dict[str, torch.Tensor]] = further[0][mine] if further else [{} for _ in ids]
    grids = [inputs.get("image_grid_thw") for inputs in pictures]
    tensors = {
        "input_ids": nested(ids),
        "position_ids": nested(
            [positions(row, step.position_rows, grid) for row, grid in zip(ids, grids, strict=True)]
        ),
        "prompts": nested([row[:begin] for row, begin in pairs]),
        "responses": nested([row[begin:] for row, begin in pairs]),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "advantages": nested([torch.randn(1, generator=generator).expand(len(mask)).clone() for mask in masks]),
    }
    data = TensorDict(tensors, batch_size=[len(ids)])
    data["multi_modal_inputs"] = NonTensorStack(*pictures)
    if step.temperature is None:
        data["temperature"] = torch.tensor([(0.7, 1.0, 1.3)[i % 3] for i in range(len(ids))])
    else:
        tu.assign_non_tensor(data, temperature=step.temperature)
    settings = {
        "use_remove_padding": step.remove_padding,
        "use_dynamic_bsz": step.dynamic,
        "max_token_len_per_gpu": budget or step.budget,
        "micro_batch_size_per_gpu": step.rows,
        "calculate_entropy": True,
        "global_batch_size": total,
        "pad_token_id": 0,
    }
    tu.assign_non_tensor(data, **(settings | step.extra))
    return data


def response_rows(data: TensorDict, values: torch.Tensor) -> torch.Tensor:
    """Model outputs of response tokens, as verl slices them."""
    rows = zip(values.unbind(), data["responses"].offsets().diff().tolist(), strict=True)
    return nested([row[len(row) - 1 - length : len(row) - 1] for row, length in rows])


def log_probs(engine: Any, data: TensorDict) -> dict[str, torch.Tensor]:
    """What a log-prob pass gives."""
    with engine.eval_mode():
        return engine.infer_batch(data, loss_function=None)["model_output"]


def train(engine: Any, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Old log-probs, reference and update of each step: what verl logs, and the log-probs themselves."""
    return [_trained(engine, step, seed) for seed, step in enumerate(steps)]


def _trained(engine: Any, step: Step, seed: int) -> dict[str, Any]:
    is_tree = isinstance(engine, TreeEngine)
    if is_tree:
        engine.configure(step.config)
    data = mini_batch(step, seed, None if is_tree else step.stock_budget)
    old = log_probs(engine, data.copy())
    rows = response_rows(data, old["log_probs"]).unbind()
    reference = [row + 0.1 * torch.sin(torch.arange(len(row))) for row in rows]
    if engine._is_lora:
        with engine.disable_adapter():
            reference = response_rows(data, log_probs(engine, data.copy())["log_probs"]).unbind()
    data["ref_log_prob"] = nested(reference)
    # Off by a little, so that ratios and clipping do something.
    data["old_log_probs"] = nested([row + 0.15 * torch.cos(torch.arange(len(row))) for row in rows])
    torch.manual_seed(seed)  # clip_cov draws tokens
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=functools.partial(ppo_loss, config=actor_config(step)))
    metrics = output["metrics"]
    return {
        "loss": sum(output["loss"]),
        "grad_norm": metrics["grad_norm"],
        "pg_loss": sum(metrics["actor/pg_loss"].values),
        "entropy": sum(metrics["actor/entropy_loss"].values),
        "kl": sum(metrics["kl_loss"].values),
        "log_probs": response_rows(data, old["log_probs"]).values(),
        "entropies": response_rows(data, old["entropy"]).values(),
        "dta": {name: value.aggregate() for name, value in metrics.items() if name.startswith("dta/")},
    }


NUMBERS = ("loss", "grad_norm", "pg_loss", "entropy", "kl")


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative difference of two steps' numbers; of log-probs and entropies, absolute."""
    numbers = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-6) for name in NUMBERS]
    return max(*numbers, *((a[name] - b[name]).abs().max().item() for name in ("log_probs", "entropies")))


def differences(setup: Setup, steps: Sequence[Step], folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Per step, how far the plugin is from stock verl, and the plugin's results."""
    stock = train(build(setup, folder, tree=False), steps)
    tree = train(build(setup, folder, tree=True), steps)
    return [difference(x, y) for x, y in zip(tree, stock, strict=True)], tree
