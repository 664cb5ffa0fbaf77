"""GRPO on Geometry3K: questions about figures, solved step by step, rewarded for the right answer.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
        -m dta_plugin.run recipes/trl/geometry3k.py --config recipes/trl/qwen3_vl_4b_geometry3k.yaml

An ordinary TRL script: it does not know the plugin (see gsm8k.py). The model's processor is the checkpoint's own; the
figures of a question and its text have `num_generations` completions, so most tokens of a micro-batch are shared, and a
figure goes through the vision tower once for all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

Messages = list[dict[str, Any]]

INSTRUCTION = (
    "You solve geometry problems. Say what the figure shows, write one short step per line, with the calculation in "
    "it, and end with a line that holds four number signs and the answer, without a unit."
)


@dataclass
class Geometry3KArguments(ScriptArguments):
    """`dataset_name` may also be a local folder, or a parquet file, with columns `images`, `problem` and `answer`."""

    dataset_name: str | None = "hiyouga/geometry3k"


def load(args: Geometry3KArguments) -> Dataset:
    """The training split as rows of `images`, `prompt` (messages) and `solution`."""
    name = str(args.dataset_name)
    if Path(name).is_file():
        data = load_dataset("parquet", data_files=name, split="train")
    else:
        data = load_dataset(name, args.dataset_config, split=args.dataset_train_split)
    return data.map(
        lambda problem, answer: {"prompt": prompt(problem), "solution": answer},
        input_columns=["problem", "answer"],  # figures stay as they are stored
        remove_columns=[column for column in data.column_names if column != "images"],
    )


def prompt(problem: str) -> Messages:
    """The instruction and the question; TRL puts the figures in front of it, in the place of the data set's marks."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": problem.replace("<image>", "").strip()},
    ]


def final_answer(text: str) -> str:
    """What follows the last "####", without spaces and marks of LaTeX that do not change it; "" where there is none."""
    found = re.findall(r"####(.*)", text)
    return re.sub(r"\\left|\\right|\\!|\\,|\^\s*\{?\s*\\circ\s*\}?|[\s$°]", "", found[-1]) if found else ""


def is_same(answer: str, solution: str) -> bool:
    """As numbers, up to a hundredth, or as text."""
    try:
        return abs(float(answer) - float(solution)) < 0.01
    except ValueError:
        return answer == solution


def correct(completions: list[Messages], solution: list[str], **_: Any) -> list[float]:
    """1 if the final answer is the solution, else 0."""
    return [
        float(is_same(final_answer(c[-1]["content"]), final_answer(f"####{s}")))
        for c, s in zip(completions, solution, strict=True)
    ]


def well_formed(completions: list[Messages], **_: Any) -> list[float]:
    """0.1 if the text has exactly one "####", on its last line, with something after it."""
    pattern = re.compile(r"(?:(?!####).)*\n####[^\n#]*\S[^\n#]*\s*", re.DOTALL)
    return [0.1 * bool(pattern.fullmatch(c[-1]["content"])) for c in completions]


def main() -> None:
    parser = TrlParser((Geometry3KArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[correct, well_formed],
        train_dataset=load(script_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
