"""A user's GRPO script that stands still within a step, goes on from a checkpoint, or has little memory, as told.

python train_disturbed.py --model MODEL --data FILE.jsonl --result FILE.pt --config FILE.yaml
    [--pause FILE] [--resume_from_checkpoint FOLDER] [--megabytes N]
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from train import reward
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer, TrlParser


@dataclass
class Arguments:
    """pause: a file that is made when step 2 has half of its gradients, where the script then stands still.

    megabytes: of address space that training may take beyond what the process has.
    """

    model: str
    data: str
    result: str
    pause: str | None = None
    megabytes: int | None = None


class StandsStill(TrainerCallback):
    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_substep_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 2:
            self.file.touch()
            time.sleep(300)


def run(arguments: Arguments, config: GRPOConfig) -> None:
    rows = [json.loads(line) for line in Path(arguments.data).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=arguments.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows)
    )
    if arguments.pause:
        trainer.add_callback(StandsStill(arguments.pause))
    if arguments.megabytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + arguments.megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, arguments.result)


if __name__ == "__main__":
    run(*TrlParser((Arguments, GRPOConfig)).parse_args_and_config())
