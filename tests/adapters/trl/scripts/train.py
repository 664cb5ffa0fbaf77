"""A user's GRPO script on stock TRL, with TRL's own parser. It knows nothing of the plugin.

python train.py --model MODEL --data FILE.jsonl --result FILE.pt --output_dir FOLDER [--config FILE.yaml] [...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser


@dataclass
class Arguments:
    """What to train on, and where the result goes."""

    model: str
    data: str
    result: str


def reward(completions: list[str], **_: Any) -> list[float]:
    """Share of words with an even number."""
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w % 2 == 0 for w in row) / (len(row) + 1) for row in words]


def run(arguments: Arguments, config: GRPOConfig) -> None:
    """Train, and leave weights and logs of this rank in `result`."""
    Path(f"{arguments.result}.reached").touch()  # before any model is loaded
    rows = [json.loads(line) for line in Path(arguments.data).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=arguments.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows)
    )
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    torch.save(
        {
            "start": start,
            "weights": dict(trainer.model.named_parameters()),
            "logs": trainer.state.log_history,
            "code": GRPOTrainer._prepare_inputs.__code__.co_filename,
            "modules": sorted(sys.modules),
            "arguments": sys.argv,
        },
        f"{arguments.result}.{config.process_index}",
    )


if __name__ == "__main__":
    run(*TrlParser((Arguments, GRPOConfig)).parse_args_and_config())
