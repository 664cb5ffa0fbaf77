"""Sudoku of 4 x 4: puzzles made here, each with one solution, and a reward that counts the cells filled right.

    python recipes/trl/sudoku.py --output runs/sudoku            # train.jsonl, 20,000 puzzles, under a minute
    python recipes/trl/diffusion.py --config recipes/trl/llada_8b_sudoku.yaml

A grid is a text of 16 digits, row by row, 0 for an empty cell; the same seed gives the same file. The answer stands in
<answer>...</answer>.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

Messages = list[dict[str, str]]
SIZE, BOX = 4, 2
INSTRUCTION = (
    "Solve this Sudoku of 4 x 4: fill every 0 with a digit from 1 to 4, so that each row, each column and each 2 x 2 "
    "box has all four. The grid is given row by row as 16 digits: {puzzle}\nGive the 16 digits of the solution, and "
    "nothing else, between <answer> and </answer>."
)


def solutions(grid: str) -> Iterator[str]:
    """Every way to fill the empty cells."""
    cell = grid.find("0")
    if cell < 0:
        yield grid
        return
    row, column = divmod(cell, SIZE)
    taken = {
        digit
        for place, digit in enumerate(grid)
        if place // SIZE == row
        or place % SIZE == column
        or (place // SIZE // BOX, place % SIZE // BOX) == (row // BOX, column // BOX)
    }
    for digit in "1234":
        if digit not in taken:
            yield from solutions(grid[:cell] + digit + grid[cell + 1 :])


def is_unique(grid: str) -> bool:
    found = solutions(grid)
    return next(found, None) is not None and next(found, None) is None


def puzzle(rng: random.Random, grids: list[str], empty: int) -> tuple[str, str]:
    """A puzzle with up to so many empty cells, and its one solution. grids: all solved ones."""
    solution = rng.choice(grids)
    given = solution
    for cell in rng.sample(range(SIZE * SIZE), SIZE * SIZE):
        blank = given[:cell] + "0" + given[cell + 1 :]
        if given.count("0") < empty and is_unique(blank):
            given = blank
    return given, solution


def write_puzzles(path: Path, rows: int, seed: int) -> None:
    """JSONL with the columns puzzle and solution; 4 to 10 empty cells."""
    rng = random.Random(f"sudoku {seed}")
    grids = list(solutions("0" * SIZE * SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(rows):
            given, solution = puzzle(rng, grids, rng.randint(4, 10))
            print(json.dumps({"puzzle": given, "solution": solution}), file=file)


def load(args: Any) -> Dataset:
    """Rows of prompt, puzzle and solution; `dataset_name` is a folder with a train.jsonl."""
    data = load_dataset("json", data_files=str(Path(args.dataset_name) / "train.jsonl"), split="train")
    return data.map(lambda row: {"prompt": prompt(row["puzzle"])})


def prompt(given: str) -> Messages:
    return [{"role": "user", "content": INSTRUCTION.format(puzzle=given)}]


def filled(completions: list[Messages], puzzle: list[str], solution: list[str], **_: Any) -> list[float]:
    """The share of empty cells that are filled right; 0 without a grid of 16 digits, or with a given cell changed."""
    rewards = []
    for completion, given, wanted in zip(completions, puzzle, solution, strict=True):
        answers = re.findall(r"<answer>([\s\d]*)</answer>", completion[-1]["content"])
        answer = re.sub(r"\s", "", answers[-1]) if answers else ""
        empty = [cell for cell, digit in enumerate(given) if digit == "0"]
        keeps = len(answer) == len(given) and all(a == g for a, g in zip(answer, given, strict=True) if g != "0")
        rewards.append(sum(answer[cell] == wanted[cell] for cell in empty) / len(empty) if keeps else 0.0)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sudoku"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_puzzles(args.output / "train.jsonl", args.rows, args.seed)


if __name__ == "__main__":
    main()
