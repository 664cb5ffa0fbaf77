"""RL of a diffusion language model, on GSM8K, Countdown, Sudoku or the quickstart's sums.

    python recipes/trl/diffusion.py --config recipes/trl/llada_8b_gsm8k.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml \
        recipes/trl/diffusion.py --config recipes/trl/llada_8b_gsm8k_ddp.yaml
    python recipes/trl/diffusion.py --config recipes/trl/quickstart_diffusion.yaml

`trl grpo` cannot load such models, hence this script. It is an ordinary TRL script with another trainer; everything
about the update is in the YAML, in the fields of DiffusionGRPOConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import countdown
import sudoku
from datasets import Dataset, load_dataset
from gsm8k import GSM8KArguments, correct, load, well_formed
from trl import ModelConfig, TrlParser, get_peft_config

from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer


@dataclass
class DiffusionArguments(GSM8KArguments):
    """`task` says how `dataset_name` is read and what is rewarded."""

    task: str = field(
        default="gsm8k", metadata={"help": "gsm8k, countdown, sudoku, or sums: what the build script of each writes."}
    )


def load_sums(args: DiffusionArguments) -> Dataset:
    """Rows of `prompt` and `answer`, as `recipes/quickstart/diffusion.py` writes them."""
    return load_dataset("json", data_files=str(Path(str(args.dataset_name)) / "train.jsonl"), split="train")


def right_sum(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a completion that is the answer and nothing else, else 0."""
    return [float(text.split() == wanted.split()) for text, wanted in zip(completions, answer, strict=True)]


TASKS: dict[str, tuple[Callable[[Any], Dataset], list[Callable[..., list[float]]]]] = {
    "gsm8k": (load, [correct, well_formed]),
    "countdown": (countdown.load, [countdown.solved]),
    "sudoku": (sudoku.load, [sudoku.filled]),
    "sums": (load_sums, [right_sum]),
}


def main() -> None:
    parser = TrlParser((DiffusionArguments, DiffusionGRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    data, rewards = TASKS[script_args.task]
    trainer = DiffusionGRPOTrainer(
        model_args.model_name_or_path,
        rewards,
        training_args,
        train_dataset=data(script_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
