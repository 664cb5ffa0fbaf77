"""verl's Megatron engine on a CPU, its own and the plugin's: updates of either, and how they differ."""

from __future__ import annotations

from dta_plugin.adapters import verl as plugin
from dta_plugin.adapters import verl_cpu  # first: verl's modules ask for the platform as they are imported

# isort: split
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mbridge.models.qwen2 import Qwen2Bridge
from megatron.core import parallel_state
from tensordict import TensorDict
from torch import distributed
from verl.trainer.config import CheckpointConfig
from verl.utils.megatron_utils import unwrap_model
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from dta_plugin.adapters.verl_cpu.megatron import TRANSFORMER_CONFIG
from dta_plugin.adapters.verl_plugin.megatron.engine import TreeMegatronEngine
from tests.adapters.verl.support import (
    NUMBERS,
    SHAPES,
    Sequences,
    Step,
    actor_config,
    mini_batch,
    nested,
    response_rows,
)

assert verl_cpu and plugin
RECOMPUTATION: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


@dataclass(frozen=True)
class Setup:
    """How an engine is built. packed: verl's own layout of rows. engine, transformer, lora: further settings."""

    model: str = "qwen3"
    packed: bool = True
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


def corners(seed: int) -> tuple[Sequences, list[int]]:
    """One-token branches and responses, duplicates, rows that are prefixes of others, a row that shares nothing."""
    base = [3 + (7 * i + seed) % 60 for i in range(14)]
    rows = [[*base[:8], token] for token in (5, 6, 7)]
    rows += [base[:9], base[:12], base, base, [*base[:12], 9], [60, 61], [62, 3, 4, 5]]
    return rows, [8, 8, 8, 8, 8, 8, 9, 10, 1, 2]


def star(seed: int) -> tuple[Sequences, list[int]]:
    """One prompt, sixteen responses."""
    prompt = [3 + (11 * i + seed) % 60 for i in range(12)]
    return [prompt + [3 + (i * i + j + seed) % 60 for j in range(1 + i % 4)] for i in range(16)], [12] * 16


SHAPES |= {"corners": corners, "star": star}


def build(setup: Setup, folder: Path, tree: bool) -> Any:
    """An initialised engine: the one that verl's registry gives, or verl's own."""
    model = HFModelConfig(path=str(folder / setup.model), load_tokenizer=False, lora=setup.lora)
    model.tokenizer = SimpleNamespace(pad_token_id=0, save_pretrained=lambda _: None)
    engine = McoreEngineConfig(
        use_remove_padding=setup.packed,
        override_transformer_config=TRANSFORMER_CONFIG | setup.transformer,
        dtype=setup.dtype,
        **{"vanilla_mbridge": True} | setup.engine,
    )
    # As for the engine of FSDP: a large eps keeps Adam's first steps near the gradient.
    optimizer = McoreOptimizerConfig(
        lr=1e-3, total_training_steps=10, clip_grad=1e6, override_optimizer_config={"adam_eps": 1e-2}
    )
    kind = EngineRegistry.get_engine_cls("language_model", "megatron") if tree else MegatronEngineWithLMHead
    found = kind(model, engine, optimizer, CheckpointConfig())
    with pytest.MonkeyPatch.context() as patch:  # mbridge keeps the names of a model with tied weights for later ones
        patch.setattr(Qwen2Bridge, "_DIRECT_MAPPING", dict(Qwen2Bridge._DIRECT_MAPPING))
        found.initialize()
    assert isinstance(found, TreeMegatronEngine) == tree
    return found


def train(engine: Any, steps: Sequence[Step], first_seed: int = 0) -> list[dict[str, Any]]:
    """Old log-probs and update of each step: what verl logs, log-probs and entropies; with the last, the weights.

    Of a pipeline, its last rank has all but weights.
    """
    found = [_trained(engine, step, seed) for seed, step in enumerate(steps, first_seed)]
    found[-1]["weights"] = weights(engine)
    return found


def _trained(engine: Any, step: Step, seed: int) -> dict[str, Any]:
    is_tree = isinstance(engine, TreeMegatronEngine)
    if is_tree:
        engine.configure(step.config)
    share = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    data = mini_batch(step, seed, None if is_tree else step.stock_budget, share)
    old = inferred(engine, data)
    rows = response_rows(data, old["log_probs"]).unbind()
    # Off by a little, so that ratios and clipping do something.
    data["old_log_probs"] = nested([row + 0.15 * torch.cos(torch.arange(len(row))) for row in rows])
    # By more, so that rounding is small beside the divergence.
    data["ref_log_prob"] = nested([row + torch.sin(torch.arange(len(row))) for row in rows])
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=functools.partial(ppo_loss, config=actor_config(step)))
    if "metrics" not in output:
        return {}
    metrics = output["metrics"]
    norm = {"grad_norm": metrics["grad_norm"]} if engine.is_mp_src_rank_with_outputs() else {}
    return norm | {
        "loss": sum(output["loss"]),
        "pg_loss": sum(metrics["actor/pg_loss"].values),
        "entropy": sum(metrics["actor/entropy_loss"].values),
        "kl": sum(metrics["kl_loss"].values),
        "log_probs": response_rows(data, old["log_probs"]).values(),
        "entropies": response_rows(data, old["entropy"]).values(),
        "dta": {name: value.aggregate() for name, value in metrics.items() if name.startswith("dta/")},
    }


def inferred(engine: Any, data: TensorDict) -> dict[str, torch.Tensor]:
    """What a log-prob pass gives, on every rank of a pipeline."""
    with engine.eval_mode():
        found = engine.infer_batch(data.copy(), loss_function=None).get("model_output")
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return found
    plain = [None if found is None else {name: list(value.unbind()) for name, value in found.items()}]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    distributed.broadcast_object_list(plain, last, parallel_state.get_pipeline_model_parallel_group())
    return {name: nested(rows) for name, rows in (plain[0] or {}).items()}


def weights(engine: Any) -> torch.Tensor:
    """All of this rank's, flat."""
    parameters = [parameter for chunk in engine.module for parameter in unwrap_model(chunk).parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative difference of two steps' numbers and weights; of log-probs and entropies, absolute."""
    found = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-6) for name in NUMBERS if name in b]
    found += [(a[name] - b[name]).abs().max().item() for name in ("log_probs", "entropies") if name in b]
    found += [((a[name] - b[name]).norm() / b[name].norm()).item() for name in ("weights",) if name in b]
    return max(found, default=0.0)


def differences(setup: Setup, steps: Sequence[Step], folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Per step, how far the plugin is from stock verl, and the plugin's results."""
    stock = train(build(setup, folder, tree=False), steps)
    tree = train(build(setup, folder, tree=True), steps)
    return [difference(x, y) for x, y in zip(tree, stock, strict=True)], tree
