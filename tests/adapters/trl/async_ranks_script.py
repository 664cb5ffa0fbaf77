"""Run by test_async_ranks.py under torchrun: asynchronous trainings with the flag; each rank saves its weights.

torchrun --nproc-per-node 2 -m tests.adapters.trl.async_ranks_script <ddp or fsdp2> <folder of models> <folder>
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from tests.adapters.trl.async_rollouts import build, samples
from tests.adapters.trl.support import enabled
from tests.support.recipes import fsdp_on_cpus

RANKS = STEPS = 2
# By case: the model, the trainer's options and the plugin's.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "packed": ("qwen3", {"gradient_accumulation_steps": 2}, {}),
    # The ranks need different numbers of chunks.
    "chunks": ("gemma2", {"gradient_checkpointing": True}, {"max_tree_tokens_per_chunk": 31}),
    "sinks": ("gpt_oss", {"router_aux_loss_coef": 0.0}, {}),
}


def rollouts(case: str) -> Any:
    """Enough for all steps and what the loader reads ahead."""
    return samples(RANKS * (STEPS * CASES[case][1].get("gradient_accumulation_steps", 1) + 2))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of it, from all ranks."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()


def run_cases(wrapper: str, models: str, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if wrapper == "fsdp2":
        fsdp_on_cpus()
    found = {}
    for case, (family, run, options) in CASES.items():
        with enabled(**options):
            output = Path(folder, case)
            model = str(Path(models, family))
            trainer = build(model, output, rollouts(case), AsyncGRPOTrainer, AsyncGRPOConfig, max_steps=STEPS, **run)
            trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
        assert any(isinstance(p, DTensor) for p in trainer.model.parameters()) == (wrapper == "fsdp2")
        found[case] = weights, logged
    torch.save(found, Path(folder, f"rank{distributed.get_rank()}.pt"))
    sys.stdout.flush()
    os._exit(0)  # as in tests/support/recipes.py


if __name__ == "__main__":
    run_cases(*sys.argv[1:])
