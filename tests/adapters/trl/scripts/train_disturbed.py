"""A user's GRPO script that saves checkpoints, stands still within a step if told to, and goes on from a checkpoint.

python train_disturbed.py --model MODEL --data FILE.jsonl --result FILE.pt --config FILE.yaml [--pause FILE] [...]
"""

from __future__ import annotations

import json
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
    """pause: a file that is made when step 2 has half of its gradients, where the script then stands still."""

    model: str
    data: str
    result: str
    pause: str | None = None


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
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, arguments.result)


if __name__ == "__main__":
    run(*TrlParser((Arguments, GRPOConfig)).parse_args_and_config())
