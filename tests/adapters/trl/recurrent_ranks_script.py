"""Run by test_recurrent_ranks.py under torchrun: every case stock and as a tree; each rank saves its runs.

torchrun --nproc-per-node 2 -m tests.adapters.trl.recurrent_ranks_script <model> <folder>

Under DDP, or under FSDP2 where the environment is what accelerate's launcher makes of such a config.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tests.adapters.trl.hybrids import MIXER_LORA
from tests.adapters.trl.support import Run, dense_and_tree
from tests.support.recipes import fsdp_on_cpus

CASES: dict[str, dict[str, Any]] = {
    "full": {"num_iterations": 2, "max_steps": 2},
    # The ranks need different numbers of chunks.
    "chunks": {
        "max_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "trainer_options": {"peft_config": MIXER_LORA},
        "dta": {"dta_max_tree_tokens_per_chunk": 45},
    },
    "merged_chunks": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "dta": {"dta_max_tree_tokens_per_chunk": 45, "dta_merge_window": "always"},
    },
}


def whole(run: Run) -> Run:
    """With weights that no rank shards."""
    start, end = (
        {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
        for weights in (run.start, run.weights)
    )
    return replace(run, start=start, weights=end)


def run_cases(model: str, folder: str, cases: dict[str, dict[str, Any]], names: Sequence[str] = ()) -> None:
    """names: of the cases that run; all if there are none."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "FSDP_VERSION" in os.environ:
        fsdp_on_cpus()
    runs = {name: [whole(run) for run in dense_and_tree(model, Path(folder), **cases[name])] for name in names or cases}
    torch.save(runs, Path(folder, f"rank{distributed.get_rank()}.pt"))
    sys.stdout.flush()
    os._exit(0)  # as in tests/support/recipes.py


if __name__ == "__main__":
    run_cases(*sys.argv[1:], CASES)
