"""Batches for the calibration benchmark: varied ones to predict, and a graded series from no sharing to a star of 32.

What is random is the same in every run. A batch is token sequences, and where each one's completion begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dta_plugin.calibrate import Case


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tokens, and lengths scaled by `scale`."""

    generator: np.random.Generator
    vocab: int
    scale: float = 1.0

    def tokens(self, length: float) -> np.ndarray:
        return self.generator.integers(self.vocab, size=max(2, round(length * self.scale)))

    def around(self, mean: float) -> np.ndarray:
        return self.tokens(mean * self.generator.uniform(0.5, 1.5))

    def one_of(self, *choices: int) -> int:
        return int(self.generator.choice(choices))

    def star(self, prompt: int, completion: int, count: int) -> tuple[list[np.ndarray], list[int]]:
        shared = self.tokens(prompt)
        rows = [np.concatenate([shared, self.around(completion)]) for _ in range(count)]
        return rows, [len(shared)] * count


def varied(vocab: int, count: int, scale: float = 1.0) -> Iterator[Case]:
    """Stars, several stars, conversations, trees of three levels, unrelated sequences: in turn, sizes at random."""
    draw = Draw(np.random.default_rng(1), vocab, scale)
    kinds = (_star, _stars, _conversation, _bushy, _unrelated)
    for index in range(count):
        yield kinds[index % len(kinds)](draw)


def _star(draw: Draw) -> Case:
    prompt, completion, count = draw.one_of(64, 256, 512), draw.one_of(16, 64, 128), draw.one_of(2, 4, 8)
    return Case(f"star {prompt}/{completion}/{count}", *draw.star(prompt, completion, count))


def _stars(draw: Draw) -> Case:
    prompt, completion, count = draw.one_of(32, 128, 512), draw.one_of(16, 64, 128), draw.one_of(2, 4)
    stars = [draw.star(prompt, completion, count) for _ in range(draw.one_of(2, 4))]
    return Case(
        f"{len(stars)} stars {prompt}/{completion}/{count}",
        [sequence for rows, _ in stars for sequence in rows],
        [first for _, firsts in stars for first in firsts],
    )


def _conversation(draw: Draw) -> Case:
    turns, length = draw.one_of(3, 6, 10), draw.one_of(16, 32, 64)
    context, rows, first_scored = draw.tokens(2 * length), [], []
    for _ in range(turns):
        first_scored.append(len(context))
        context = np.concatenate([context, draw.around(length)])
        rows.append(context)
        context = np.concatenate([context, draw.tokens(length / 2)])
    return Case(f"conversation of {turns} turns of {length}", rows, first_scored)


def _bushy(draw: Draw) -> Case:
    fan, length = draw.one_of(2, 3, 4), draw.one_of(16, 32, 64)
    paths = [draw.tokens(length)]
    for _ in range(2):
        paths = [np.concatenate([path, draw.around(length)]) for path in paths for _ in range(fan)]
    return Case(f"2 levels of {fan} branches of {length}", paths, [max(1, len(path) // 2) for path in paths])


def _unrelated(draw: Draw) -> Case:
    count, length = draw.one_of(1, 4, 8), draw.one_of(64, 128, 256)
    rows = [draw.around(length) for _ in range(count)]
    return Case(f"{count} unrelated of {length}", rows, [max(1, len(row) // 4) for row in rows])


def graded(vocab: int, scale: float = 1.0) -> Iterator[Case]:
    """40 batches: fan-outs 1 to 32 with growing prompts, small and large; the first ones share nothing."""
    draw = Draw(np.random.default_rng(2), vocab, scale)
    for length in (64, 256):
        for count in (1, 2, 4, 8):
            rows = [draw.around(length) for _ in range(count)]
            yield Case(f"{count} unrelated of {length}", rows, [max(1, len(row) // 4) for row in rows])
    for count in (2, 4, 8, 32):
        for completion in (16, 64):
            for share in (0.1, 0.25, 0.5, 0.8):
                prompt = round(completion * share / (1 - share))
                yield Case(f"star {prompt}/{completion}/{count}", *draw.star(prompt, completion, count))
