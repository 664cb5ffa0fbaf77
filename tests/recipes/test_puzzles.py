"""Countdown and Sudoku: every task can be solved, the same seed makes the same file, rewards check the answer."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import recipes as support


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, support.RECIPES / "trl" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


countdown, sudoku = module("countdown"), module("sudoku")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Every value of every expression of all the numbers."""
    if len(numbers) == 1:
        return set(numbers)
    values: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for joined in [a + b, a - b, a * b] + ([a / b] if b else []):
            values |= reachable([*rest, joined])
    return values


def test_every_target_can_be_reached() -> None:
    rng = random.Random(0)
    for _ in range(100):
        numbers, target = countdown.task(rng)
        assert len(numbers) == 3 and 1 <= target <= 999 and all(1 <= number <= 99 for number in numbers)
        assert target in reachable([Fraction(number) for number in numbers])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>(8 - 2) * 7</answer>", 1.0),
        ("First <answer>8+2+7</answer>, no: <answer> 7*(8-2) </answer>", 1.0),
        ("<answer>8 + 2 + 7</answer>", 0.1),  # another value
        ("<answer>7 * 8 - 7 * 2</answer>", 0.0),  # the value, with a number used twice
        ("<answer>42</answer>", 0.0),
        ("<answer>(8 - 2) * 7 = 42</answer>", 0.0),
        ("<answer>8 / (2 - 2) * 7</answer>", 0.0),
        ("<answer>8 ** 2 - 7</answer>", 0.0),
        ("<answer>__import__('os').getcwd()</answer>", 0.0),
        ("<answer>(8 - 2 * 7</answer>", 0.0),
        ("<answer>(8 - 2) * 7.0</answer>", 0.0),
        ("(8 - 2) * 7", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_of_countdown(text: str, reward: float) -> None:
    assert countdown.solved([said(text)], numbers=[[2, 7, 8]], target=[42], prompts=[None]) == [reward]


def test_division_is_exact() -> None:
    assert countdown.evaluate("8 / 3 * 3") == (Fraction(8), [8, 3, 3])
    assert countdown.evaluate("(" * 20_000 + "1") is None


def test_puzzles_have_one_solution() -> None:
    grids = list(sudoku.solutions("0" * 16))
    assert len(grids) == len(set(grids)) == 288  # all that there are
    rng = random.Random(0)
    for empty in (4, 7, 10):
        given, solution = sudoku.puzzle(rng, grids, empty)
        assert given.count("0") == empty and list(sudoku.solutions(given)) == [solution]
    assert not sudoku.is_unique("0" * 16) and not sudoku.is_unique("11" + "0" * 14)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>1234341221434321</answer>", 1.0),
        ("<answer>1234 3412\n2143 4321</answer>", 1.0),
        ("<answer>1234341221434311</answer>", 0.75),  # one of four cells is wrong
        ("<answer>1234341221434312</answer> <answer>1234341221434321</answer>", 1.0),
        ("<answer>2234341221434321</answer>", 0.0),  # a given cell is another
        ("<answer>123434122143432</answer>", 0.0),
        ("<answer>0234341221434300</answer>", 0.0),
        ("1234341221434321", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_of_sudoku(text: str, reward: float) -> None:
    found = sudoku.filled([said(text)], puzzle=["1234341200434300"], solution=["1234341221434321"], prompts=[None])
    assert found == [reward]


@pytest.mark.parametrize("task", [countdown, sudoku])
def test_files(task: Any, tmp_path: Path) -> None:
    """The same seed, the same file; another one, another; rows as the trainer reads them."""
    write = task.write_tasks if task is countdown else task.write_puzzles
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name / "train.jsonl", 20, seed)
    one, same, other = ((tmp_path / name / "train.jsonl").read_text() for name in "abc")
    assert one == same != other
    rows = task.load(Namespace(dataset_name=str(tmp_path / "a")))
    assert len(rows) == 20
    for row, line in zip(rows, one.splitlines(), strict=True):
        (message,) = row["prompt"]
        values = json.loads(line)
        shown = values["puzzle"] if task is sudoku else str(values["target"])
        assert message["role"] == "user" and shown in message["content"]
