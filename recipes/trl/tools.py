"""GRPO with a tool: arithmetic stories that the model solves by calling a calculator, over several turns.

    python -m dta_plugin.run recipes/trl/tools.py --config recipes/trl/qwen3_4b_tools.yaml

An ordinary TRL script: it does not know the plugin (see gsm8k.py). TRL runs the loop: it parses a turn's tool calls,
calls `calculate`, appends the results and lets the model go on, until a turn has no call. Nothing is downloaded but
the model: the stories are made up here.

Rollouts of one prompt part at their first different call and go on from there, so their tree forks turn by turn;
tool results are part of it, and carry no loss.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.stories import calculate, final_number, story

Messages = list[dict[str, Any]]


@dataclass
class ToolArguments:
    """What the script itself takes."""

    stories: int = field(default=4000, metadata={"help": "Number of training prompts."})
    story_seed: int = field(default=0, metadata={"help": "Seed of the stories."})


def correct(completions: list[Messages], solution: list[int], **_: Any) -> list[float]:
    """1 if the last turn ends with the right number, else 0."""
    return [
        float(final_number(turns[-1].get("content") or "") == s) for turns, s in zip(completions, solution, strict=True)
    ]


def used_tool(completions: list[Messages], **_: Any) -> list[float]:
    """0.1 if the calculator was called and no call failed."""
    results = [[turn["content"] for turn in turns if turn["role"] == "tool"] for turns in completions]
    return [0.1 * (bool(found) and not any("error" in text for text in found)) for found in results]


def main() -> None:
    parser = TrlParser((ToolArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    rng = random.Random(script_args.story_seed)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[correct, used_tool],
        train_dataset=Dataset.from_list([story(rng) for _ in range(script_args.stories)]),
        tools=[calculate],
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
