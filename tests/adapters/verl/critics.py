"""Value models on verl's FSDP engines: PPO with GAE, values first, then an update of the critic."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen3ForTokenClassification
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import compute_gae_advantage_return
from verl.workers.config import FSDPCriticConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
from verl.workers.utils.losses import value_loss

from dta_plugin.adapters.verl_plugin.critic import TreeCriticEngine
from dta_plugin.adapters.verl_plugin.reach import MODULE
from tests.adapters.verl.support import Setup, Step, log_probs, mini_batch, nested, response_rows


def save_critic(folder: Path) -> Path:
    """The tiny model in `folder`, with a random value head, in its folder `critic`."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder, num_labels=1, classifier_dropout=0.0)
    critic = Qwen3ForTokenClassification(config)
    torch.nn.init.normal_(critic.score.bias)
    critic.save_pretrained(folder / "critic")
    return folder / "critic"


def build_critic(setup: Setup, folder: Path, tree: bool) -> Any:
    """An initialised engine: the one that verl's registry gives, or verl's own."""
    model = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        enable_gradient_checkpointing=setup.checkpointing,
        model_type="value_model",
        external_lib=MODULE,
    )
    engine = FSDPEngineConfig(
        strategy=setup.strategy,
        model_dtype="fp32",
        mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
        use_torch_compile=False,
    )
    optimizer = FSDPOptimizerConfig(
        lr=1e-3, total_training_steps=10, clip_grad=1e6, override_optimizer_config={"eps": 1e-2}
    )
    kind = EngineRegistry.get_engine_cls("value_model", setup.strategy) if tree else FSDPEngineWithValueHead
    found = kind(model, engine, optimizer, CheckpointConfig())
    found.initialize()
    assert isinstance(found, TreeCriticEngine) == tree
    return found


def train(engine: Any, steps: Sequence[Step], whole_rows: bool = False) -> list[dict[str, Any]]:
    """Per step values, GAE's returns, and an update of the critic: what verl logs, values, and advantages."""
    return [_trained(engine, step, seed, whole_rows) for seed, step in enumerate(steps)]


def _trained(engine: Any, step: Step, seed: int, whole_rows: bool) -> dict[str, Any]:
    budget = None if isinstance(engine, TreeCriticEngine) else step.stock_budget
    data = mini_batch(step, seed, budget)
    found = log_probs(engine, data.copy())["values"]
    values = response_rows(data, found)
    masks = data["response_mask"].to_padded_tensor(0)
    rewards = torch.zeros(masks.shape)
    rewards[:, 0] = torch.arange(len(masks)) % 3
    advantages, returns = compute_gae_advantage_return(rewards, values.to_padded_tensor(0.0), masks, 0.99, 0.95)
    lengths = data["responses"].offsets().diff().tolist()
    data["values"] = nested([row + 0.3 * torch.cos(torch.arange(len(row))) for row in values.unbind()])
    data["returns"] = nested([row[:length] for row, length in zip(returns, lengths, strict=True)])
    config = FSDPCriticConfig(
        strategy="fsdp2", rollout_n=4, use_dynamic_bsz=True, loss_agg_mode=step.loss_agg_mode, cliprange_value=0.2
    )
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=functools.partial(value_loss, config=config))
    metrics = output["metrics"]
    return {
        "loss": sum(output["loss"]),
        "grad_norm": metrics["grad_norm"],
        "vf_loss": sum(getattr(metrics["critic/vf_loss"], "values", metrics["critic/vf_loss"])),
        "values": found.values() if whole_rows else values.values(),
        "advantages": advantages,
        "dta": {name: value.aggregate() for name, value in metrics.items() if name.startswith("dta/")},
    }


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative difference of two steps' numbers; of values and advantages, absolute."""
    numbers = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-6) for name in ("loss", "grad_norm", "vf_loss")]
    return max(*numbers, *((a[name] - b[name]).abs().max().item() for name in ("values", "advantages")))
