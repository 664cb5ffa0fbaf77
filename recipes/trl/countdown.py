"""Countdown: reach a number with three others, each used once. Tasks made here, and a reward that checks the answer.

    python recipes/trl/countdown.py --output runs/countdown      # train.jsonl, 20,000 tasks, seconds
    python recipes/trl/diffusion.py --config recipes/trl/llada_8b_countdown.yaml

Every task has a solution, and the same seed gives the same file. The answer stands in <answer>...</answer>: an
expression of + - * / and parentheses, computed in fractions.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

Messages = list[dict[str, str]]
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
INSTRUCTION = (
    "Using the numbers {numbers}, write an expression that equals {target}. Use each number exactly once, with + - * / "
    "and parentheses. Think first, then give the expression alone between <answer> and </answer>."
)


def task(rng: random.Random, count: int = 3) -> tuple[list[int], int]:
    """Numbers from 1 to 99 and a target from 1 to 999 that they reach."""
    while True:
        numbers = [rng.randint(1, 99) for _ in range(count)]
        left = [Fraction(number) for number in numbers]
        while len(left) > 1:
            a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
            apply = rng.choice([own for kind, own in OPERATORS.items() if b or kind is not ast.Div])
            left.append(apply(a, b))
        if left[0].denominator == 1 and 1 <= left[0] <= 999:
            return numbers, int(left[0])


def write_tasks(path: Path, rows: int, seed: int) -> None:
    """JSONL with the columns numbers and target."""
    rng = random.Random(f"countdown {seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(rows):
            numbers, target = task(rng)
            print(json.dumps({"numbers": numbers, "target": target}), file=file)


def load(args: Any) -> Dataset:
    """Rows of prompt, numbers and target; `dataset_name` is a folder with a train.jsonl."""
    data = load_dataset("json", data_files=str(Path(args.dataset_name) / "train.jsonl"), split="train")
    return data.map(lambda row: {"prompt": prompt(row["numbers"], row["target"])})


def prompt(numbers: list[int], target: int) -> Messages:
    return [{"role": "user", "content": INSTRUCTION.format(numbers=", ".join(map(str, numbers)), target=target)}]


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers in it; None for what is none, or divides by 0."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return Fraction(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        raise ValueError(f"{type(node).__name__} is no part of an answer")

    used: list[int] = []
    try:
        return value(ast.parse(expression.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def solved(completions: list[Messages], numbers: list[list[int]], target: list[int], **_: Any) -> list[float]:
    """1 for the target, 0.1 for another value of the right numbers, else 0."""
    rewards = []
    for completion, given, wanted in zip(completions, numbers, target, strict=True):
        answers = re.findall(r"<answer>([^<]{1,100})</answer>", completion[-1]["content"])
        found = evaluate(answers[-1]) if answers else None
        if found is None or Counter(found[1]) != Counter(given):
            rewards.append(0.0)
        else:
            rewards.append(1.0 if found[0] == wanted else 0.1)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/countdown"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_tasks(args.output / "train.jsonl", args.rows, args.seed)


if __name__ == "__main__":
    main()
