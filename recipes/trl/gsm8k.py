"""GRPO on GSM8K: school word problems, solved step by step, rewarded for the right number.

    python -m dta_plugin.run recipes/trl/gsm8k.py --config recipes/trl/qwen3_0.6b_gsm8k.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml \
        -m dta_plugin.run recipes/trl/gsm8k.py --config recipes/trl/qwen3_8b_gsm8k_lora.yaml

An ordinary TRL script: it does not know the plugin. The launcher takes `use_dta` and `dta_*` out of the YAML before
the script reads it; with `--use_dta false` added, stock TRL trains the same thing. Every prompt starts with the same
instruction and worked examples and has `num_generations` completions: most tokens of a micro-batch are shared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

Messages = list[dict[str, str]]

INSTRUCTION = (
    "You solve word problems. Write one short step per line, with the calculation in it. End with a line that holds "
    "four number signs and the answer, as a plain number without a unit."
)
EXAMPLES = [
    (
        "A bakery sells 24 muffins in the morning and half as many in the afternoon, at $3 each. How many dollars does "
        "it take in?",
        "In the afternoon it sells 24 / 2 = 12 muffins.\nOver the day it sells 24 + 12 = 36 muffins.\n"
        "It takes in 36 * 3 = 108 dollars.\n#### 108",
    ),
    (
        "Nora is 9 years old. Her brother is 4 years older than she is, and their mother is three times as old as the "
        "brother. How old will the mother be in 5 years?",
        "The brother is 9 + 4 = 13 years old.\nThe mother is 13 * 3 = 39 years old.\n"
        "In 5 years she will be 39 + 5 = 44.\n#### 44",
    ),
    (
        "Omar has 5 boxes of 12 pencils. He gives 15 pencils away and splits the rest evenly between himself and 2 "
        "friends. How many pencils does each of the three get?",
        "Omar has 5 * 12 = 60 pencils.\nAfter giving some away he has 60 - 15 = 45.\n"
        "Each of the 1 + 2 = 3 people gets 45 / 3 = 15.\n#### 15",
    ),
    (
        "A $40 shirt is on sale at 25% off. Lena buys 2 of them and pays with a $100 bill. How many dollars does she "
        "get back?",
        "The discount is 40 * 25 / 100 = 10 dollars.\nA shirt costs 40 - 10 = 30 dollars.\n"
        "Two shirts cost 2 * 30 = 60 dollars.\nShe gets back 100 - 60 = 40 dollars.\n#### 40",
    ),
]
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


@dataclass
class GSM8KArguments(ScriptArguments):
    """`dataset_name` may also be a local folder, or a JSONL file, with columns `question` and `answer` ("#### 42")."""

    dataset_name: str | None = "openai/gsm8k"
    dataset_config: str | None = "main"


def load(args: GSM8KArguments) -> Dataset:
    """The training split as rows of `prompt` (messages) and `solution` (the number)."""
    name = str(args.dataset_name)
    if Path(name).is_file():
        data = load_dataset("json", data_files=name, split="train")
    else:
        config = None if Path(name).is_dir() else args.dataset_config
        data = load_dataset(name, config, split=args.dataset_train_split)
    return data.map(
        lambda row: {"prompt": prompt(row["question"]), "solution": final_number(row["answer"])},
        remove_columns=data.column_names,
    )


def prompt(question: str) -> Messages:
    """The instruction, the worked examples as earlier turns of the chat, and the question."""
    messages = [{"role": "system", "content": INSTRUCTION}]
    for asked, solved in EXAMPLES:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": solved}]
    return [*messages, {"role": "user", "content": question}]


def final_number(text: str) -> float:
    """The number after the last "####"; where there is none NaN, which equals nothing."""
    found = re.findall(rf"####\s*\$?({NUMBER})", text)
    return float(found[-1].replace(",", "") if found else "nan")


def correct(completions: list[Messages], solution: list[float], **_: Any) -> list[float]:
    """1 if the final number is the solution, else 0."""
    return [float(final_number(c[-1]["content"]) == s) for c, s in zip(completions, solution, strict=True)]


def well_formed(completions: list[Messages], **_: Any) -> list[float]:
    """0.1 if the text has exactly one "####", on its last line, with nothing but a number after it."""
    pattern = re.compile(rf"(?:(?!####).)*\n#### {NUMBER}\s*", re.DOTALL)
    return [0.1 * bool(pattern.fullmatch(c[-1]["content"])) for c in completions]


def main() -> None:
    parser = TrlParser((GSM8KArguments, GRPOConfig, ModelConfig))
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
