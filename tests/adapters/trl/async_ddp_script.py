"""Run by test_async_ddp.py under torchrun: asynchronous trainings with the flag; each rank saves its weights.

torchrun --nproc-per-node 2 -m tests.adapters.trl.async_ddp_script <folder of models> <folder>
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from tests.adapters.trl.async_rollouts import build, samples
from tests.adapters.trl.support import enabled

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


def run_cases(models: str, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {}
    for case, (family, run, options) in CASES.items():
        with enabled(**options):
            output = Path(folder, case)
            model = str(Path(models, family))
            trainer = build(model, output, rollouts(case), AsyncGRPOTrainer, AsyncGRPOConfig, max_steps=STEPS, **run)
            trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        found[case] = weights, logged
    torch.save(found, Path(folder, f"rank{distributed.get_rank()}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_cases(*sys.argv[1:])
