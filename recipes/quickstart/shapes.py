"""The image quickstart's task: how many shapes does a picture show?

    reward_funcs: [recipes.quickstart.shapes.right_count]   # in a `trl grpo` recipe

A picture is a grid of cells, each blank or with a square or a circle in one of three colours; the answer is a number,
the question always the same. Promises: Pillow only, no model, no state, nothing downloaded. The reward is one float
per completion, and goes by the last number in the text: a released model can be trained on the same data.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

SIDE = 3  # cells
CELL = 32  # pixels: one token of a Qwen3-VL, whose patches of 16 are merged two by two
SHAPES = ("square", "circle")
COLOURS = ("red", "green", "blue")
QUESTION = (
    "The picture shows red, green and blue squares and circles. How many shapes are there in all? Count the red ones, "
    "the green ones and the blue ones, add the three counts, and end with the number of all shapes."
)
PROMPT = [{"role": "user", "content": QUESTION}]  # TRL puts the image of the same row into it
Cell = tuple[str, str] | None  # a shape and its colour


@dataclass(frozen=True)
class Picture:
    """cells: what is in each, row by row."""

    cells: tuple[Cell, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Picture:
        """Up to as many shapes of each colour as fill a row, anywhere."""
        cells: list[Cell] = [(rng.choice(SHAPES), colour) for colour in COLOURS for _ in range(rng.randrange(SIDE + 1))]
        cells += [None] * (SIDE**2 - len(cells))
        rng.shuffle(cells)
        return cls(tuple(cells))

    def counts(self) -> list[int]:
        """Shapes of each colour."""
        return [sum(cell is not None and cell[1] == colour for cell in self.cells) for colour in COLOURS]

    def image(self) -> Image.Image:
        """RGB, on a white ground."""
        image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), "white")
        pen = ImageDraw.Draw(image)
        for index, cell in enumerate(self.cells):
            left, top = index % SIDE * CELL + CELL // 8, index // SIDE * CELL + CELL // 8
            box = (left, top, left + 3 * CELL // 4, top + 3 * CELL // 4)
            if cell is not None:
                (pen.rectangle if cell[0] == "square" else pen.ellipse)(box, fill=cell[1])
        return image


def last_number(text: str) -> int | None:
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


def right_count(completions: list[list[dict[str, Any]]], answer: list[int], **_: Any) -> list[float]:
    """1 for a completion whose last number is the answer, 0 for any other."""
    return [float(last_number(turns[-1]["content"]) == count) for turns, count in zip(completions, answer, strict=True)]
