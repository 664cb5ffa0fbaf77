"""Run by test_ddp.py under torchrun: every case stock and as a tree, on every rank; each rank saves its runs.

torchrun --nproc-per-node 2 -m tests.adapters.trl.ddp_script <model> <folder> [case ...]
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.adapters.trl.support import LORA, dense_and_tree

LORA_OPTIONS: dict[str, Any] = {"trainer_options": {"peft_config": LORA}}
CASES: dict[str, dict[str, Any]] = {
    "full": {"num_iterations": 2, "max_steps": 4},
    "reference": {"beta": 0.4, "loss_type": "grpo"},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "lora": {"beta": 0.4, **LORA_OPTIONS},
    "two_windows": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4},
    "lora_two_steps": {"steps_per_generation": 2, "gradient_accumulation_steps": 2, **LORA_OPTIONS},
    "small_groups": {"per_device_train_batch_size": 4, "loss_type": "bnpo"},
    # The ranks need different numbers of chunks; a wrapper that is called once per chunk hangs here.
    "chunks": {"beta": 0.4, "loss_type": "grpo", "dta": {"dta_max_tree_tokens_per_chunk": 45}},
    # One tree per window; the ranks' last micro-steps are the only ones that DDP sees.
    "merged": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "merged_chunks": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "dta": {"dta_max_tree_tokens_per_chunk": 45, "dta_merge_window": "always"},
    },
    # One rank would pass the gate by itself, the other would not; an own decision of each hangs here.
    "gated": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "dta": {"dta_min_saving": 0.43, "dta_merge_window": "always", "dta_prune": "never"},
    },
    "verified": {"dta": {"dta_verify": "first", "dta_picture": "tree.svg"}},
}


def run_cases(cases: dict[str, dict[str, Any]], model: str, folder: str, *names: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    own = Path(folder, f"of_rank{os.environ['RANK']}")  # for what a rank writes without being told where
    own.mkdir(exist_ok=True)
    os.chdir(own)
    runs = {name: dense_and_tree(model, Path(folder), **cases[name]) for name in names or cases}
    torch.save(runs, Path(folder, f"rank{distributed.get_rank()}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_cases(CASES, *sys.argv[1:])
