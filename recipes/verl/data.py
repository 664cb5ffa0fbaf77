"""Write the data of the GPU recipes as verl reads it: a conversation and its answer per row; with images as parquet.

python recipes/verl/data.py gsm8k      # data/gsm8k/{train,test}.jsonl, from the hub; verl knows the reward
python recipes/verl/data.py geo3k      # data/geo3k/{train,test}.parquet, from the hub; verl knows the reward
python recipes/verl/data.py stories    # data/stories/{train,test}.jsonl, made up here; see recipes/stories.py
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.stories import story

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
FIGURES = (  # what verl's built-in reward for Geometry3K looks for
    "First think about the reasoning, enclosed in <think> </think> tags. Then give the final answer in \\boxed{}."
)
STORIES = {"train": 4000, "test": 200}

Row = dict[str, Any]


def gsm8k(split: str) -> Iterator[Row]:
    """GSM8K with the instruction and the data source that verl's built-in reward goes by."""
    from datasets import load_dataset

    for row in load_dataset("openai/gsm8k", "main", split=split):
        answer = row["answer"].split("####")[1].strip().replace(",", "")
        messages = [{"role": "user", "content": f"{row['question']} {INSTRUCTION}"}]
        yield {"data_source": "openai/gsm8k", "prompt": messages, "reward_model": rule(answer)}


def geo3k(split: str) -> Dataset:
    """Geometry3K: `<image>` in a question stands for the next of its figures."""
    from datasets import load_dataset

    return figures(load_dataset("hiyouga/geometry3k", split=split))


def figures(data: Dataset) -> Dataset:
    """Rows of `problem`, `answer` and `images` as verl wants them."""

    def row(problem: str, answer: str, index: int) -> Row:
        messages = [{"role": "user", "content": f"{problem} {FIGURES}"}]
        made = {"data_source": "hiyouga/geometry3k", "prompt": messages, "reward_model": rule(answer)}
        return made | {"extra_info": {"index": index}}

    return data.map(row, input_columns=["problem", "answer"], with_indices=True, remove_columns=["problem", "answer"])


def stories(split: str) -> Iterator[Row]:
    """Stories for the tool agent; those for tests are others."""
    rng = random.Random(split)
    for _ in range(STORIES[split]):
        made = story(rng)
        yield {"data_source": "stories", "prompt": made["prompt"], "reward_model": rule(str(made["solution"]))}


def rule(answer: str) -> Row:
    """Where verl's reward functions find the answer."""
    return {"style": "rule", "ground_truth": answer}


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for index, row in enumerate(rows):
            print(json.dumps(row | {"extra_info": {"index": index}}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["gsm8k", "geo3k", "stories"])
    parser.add_argument("--output", type=Path, default=Path("data"))
    args = parser.parse_args()
    for split in ("train", "test"):
        path = args.output / args.task / split
        if args.task == "geo3k":
            path.parent.mkdir(parents=True, exist_ok=True)
            geo3k(split).to_parquet(path.with_suffix(".parquet"))
        else:
            write(path.with_suffix(".jsonl"), {"gsm8k": gsm8k, "stories": stories}[args.task](split))


if __name__ == "__main__":
    main()
