"""The image quickstart's task: how many red shapes, or blue ones, does a picture show?

    reward_funcs: [recipes.quickstart.shapes.right_count]   # in a `trl grpo` recipe

A picture is a grid of cells, each blank or with a square or a circle in one of two colours; the answer is a number.
Promises: Pillow only, no model, no state, nothing downloaded. The reward is one float per completion, and goes by the
last number in the text, so that a released model can be trained on the same data.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

ROWS = COLUMNS = 3
CELL = 32  # pixels: one token of a Qwen3-VL, whose patches of 16 are merged two by two
SHAPES = ("square", "circle")
COLOURS = ("red", "blue")
BLANK = 0.4  # how many cells are blank
QUESTION = (
    "The picture shows red and blue squares and circles in three rows. How many {colour} shapes are there? Count the "
    "{colour} shapes row by row, from the top to the bottom, add the three counts, and end with the number of {colour} "
    "shapes."
)
Cell = tuple[str, str] | None  # a shape and its colour


@dataclass(frozen=True)
class Picture:
    """cells: what is in each, row by row."""

    cells: tuple[Cell, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Picture:
        def cell() -> Cell:
            return None if rng.random() < BLANK else (rng.choice(SHAPES), rng.choice(COLOURS))

        return cls(tuple(cell() for _ in range(ROWS * COLUMNS)))

    def counts(self, colour: str) -> list[int]:
        """How many shapes of this colour each row has."""
        asked = [cell is not None and cell[1] == colour for cell in self.cells]
        return [sum(asked[start : start + COLUMNS]) for start in range(0, len(asked), COLUMNS)]

    def image(self) -> Image.Image:
        """RGB, on a white ground."""
        image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
        pen = ImageDraw.Draw(image)
        for index, cell in enumerate(self.cells):
            left, top = index % COLUMNS * CELL + CELL // 8, index // COLUMNS * CELL + CELL // 8
            box = (left, top, left + 3 * CELL // 4, top + 3 * CELL // 4)
            if cell is not None:
                (pen.rectangle if cell[0] == "square" else pen.ellipse)(box, fill=cell[1])
        return image


def question(colour: str) -> list[dict[str, str]]:
    """The prompt as TRL reads it beside a column `image`: the picture comes first."""
    return [{"role": "user", "content": QUESTION.format(colour=colour)}]


def last_number(text: str) -> int | None:
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


def right_count(completions: list[list[dict[str, Any]]], answer: list[int], **_: Any) -> list[float]:
    """1 for a completion whose last number is the answer, 0 for any other."""
    return [float(last_number(turns[-1]["content"]) == count) for turns, count in zip(completions, answer, strict=True)]
