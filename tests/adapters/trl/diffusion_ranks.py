"""Run by test_diffusion_ranks.py under torchrun: diffusion trainers under DDP or FSDP2, each rank with its own rows.

torchrun --nproc-per-node 2 -m tests.adapters.trl.diffusion_ranks <ddp or fsdp2> <folder>

Each rank saves, per case, its `tiny.Outcome` as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dta_plugin.adapters.trl import DiffusionGRPOTrainer
from dta_plugin.adapters.trl.diffusion import trainer as module
from dta_plugin.adapters.trl.diffusion.micro_batch import MASK_SEEDS
from dta_plugin.training.diffusion.batch import Rollout
from tests.adapters.trl import diffusion as tiny
from tests.support.recipes import fsdp_on_cpus

ROWS = 8  # of the union batch
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
# Options, and the advantages of the union batch; the second rank has its second half.
MIXED = [1.0, -1.0, 0.5, -0.5, 0.0, 1.5, -0.25, -1.25]
IDLE = [1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "bgpo": ({"num_iterations": 2, "beta": 0.5}, MIXED),
    "bgpo, idle rank": ({}, IDLE),
    "bgpo, t form, idle rank": ({"mask_form": "t", "num_elbo_samples": 3}, IDLE),
    "bgpo, checkpointing": ({"gradient_checkpointing": True}, MIXED),
    "bgpo, lora, idle rank": ({"lora": True, "beta": 0.5}, IDLE),
    "trajectory": ({"objective": "trajectory", "num_iterations": 2, "beta": 0.5, "num_elbo_samples": 3}, MIXED),
    "bgpo, blocks": ({"num_iterations": 2, "beta": 0.5, "attention_block_length": 2}, MIXED),
    "trajectory, blocks, idle rank": ({"objective": "trajectory", "attention_block_length": 2}, IDLE),
    "trajectory, idle rank": ({"objective": "trajectory"}, IDLE),
    "trajectory, lora, idle rank": ({"objective": "trajectory", "lora": True, "num_elbo_samples": 2}, IDLE),
    "gdsd": ({"objective": "gdsd", "num_iterations": 2, "beta": 0.5}, MIXED),
    "gdsd, idle rank": ({"objective": "gdsd"}, IDLE),
    "gdsd, held, idle rank": ({"objective": "gdsd", "num_iterations": 2, "gradient_checkpointing": True}, IDLE),
    "gdsd, lora, idle rank": ({"objective": "gdsd", "lora": True}, IDLE),
    "vrpo, idle rank": ({"objective": "vrpo"}, IDLE),
    "diffu-grpo, idle rank": ({"objective": "diffu-grpo", "num_elbo_samples": 16}, IDLE),
}


class FixedRows(DiffusionGRPOTrainer):
    """Reads its part of one batch instead of generating; what is stored of old and reference policies stays TRL's."""

    advantages: list[float]

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        generator = torch.Generator().manual_seed(7)
        lengths = [8, 3, 5, 8, 1, 6, 8, 2]
        rows = [torch.randint(3, tiny.MASK, (n,), generator=generator).tolist() for n in lengths]
        if self.args.objective == "trajectory":
            canvas = torch.tensor([row + [tiny.MASK] * (8 - len(row)) for row in rows])
            steps = torch.arange(8).flip(0).expand(len(rows), 8) // 2
            self._rollout = Rollout(canvas[self.share], steps.masked_fill(canvas == tiny.MASK, -1)[self.share])
        return rows[self.share], None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        inputs = super()._generate_and_score_completions(inputs)
        inputs["advantages"] = torch.tensor(self.advantages)[self.share]
        return inputs

    @property
    def share(self) -> slice:
        own = ROWS // self.accelerator.num_processes
        return slice(self.accelerator.process_index * own, (self.accelerator.process_index + 1) * own)


def fixed_seeds(count: int, device: torch.device) -> torch.Tensor:
    """In place of seeds that are drawn: those of the rows in the union batch."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return 1000 + rank * count + torch.arange(count)


def outcome(name: str, folder: Path, world: int, **more: Any) -> tiny.Outcome:
    """Two optimizer steps of two micro-batches each."""
    module.draw_seeds = fixed_seeds
    options, advantages = CASES[name]
    options = dict(options)
    torch.manual_seed(0)
    policy = get_peft_model(tiny.model(), LORA).double() if options.pop("lora", False) else tiny.model()
    trainer = tiny.trainer(
        folder,
        policy,
        FixedRows,
        per_device_train_batch_size=ROWS // 2 // world,
        max_steps=2,
        shuffle_dataset=False,
        **options,
        **more,
    )
    trainer.advantages = advantages
    recorder = tiny.recorded(trainer)
    wrapper = {1: type(policy), 2: FSDPModule if trainer.is_fsdp_enabled else DistributedDataParallel}[world]
    assert isinstance(trainer.model_wrapped, wrapper)
    assert all(MASK_SEEDS in batch for step in recorder.steps for batch in step.micro_batches)
    return tiny.Outcome([step.gradients for step in recorder.steps], recorder.weights(), trainer.state.log_history)


def generated(folder: Path) -> tiny.Outcome:
    """A real run in which one rank's completions end in the first block, and the other's never."""
    options = {"max_completion_length": 24, "block_length": 2, "gradient_checkpointing": True}
    trainer = tiny.trainer(folder, tiny.model(torch.float32), per_device_train_batch_size=2, max_steps=2, **options)
    ends = tuple(range(2, tiny.MASK)) if distributed.get_rank() else ()
    trainer.family = replace(trainer.family, eos_token_ids=ends)
    recorder = tiny.recorded(trainer)
    return tiny.Outcome([step.gradients for step in recorder.steps], recorder.weights(), trainer.state.log_history)


def main(wrapper: str, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if wrapper == "fsdp2":
        fsdp_on_cpus()
    outcomes = {name: outcome(name, folder, 2) for name in CASES}
    outcomes["generated"] = generated(folder)
    torch.save(outcomes, folder / f"rank{distributed.get_rank()}.pt")
    sys.stdout.flush()
    os._exit(0)  # as in tests/support/recipes.py


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
