"""Batches that the balancing benchmark deals out. What is random is the same in every run.

Lengths follow what GRPO runs see: prompts of all lengths up to a limit, completions exponential around their mean.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common.workloads import encoder, rollouts, turns_of

VOCAB = 32768
# (groups, sequences per group), some of them also with a system prompt; (prompts, trials per prompt).
STARS, SYSTEM, COMBS = ((64, 8), (64, 16), (256, 8), (256, 16)), ((64, 8), (256, 16)), ((16, 8), (64, 4))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """sequences: int64 [len] each. groups: prompts, or tasks; 1 for a single tree."""

    name: str
    sequences: list[np.ndarray]
    groups: int


class Lengths:
    """Random tokens of random lengths."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.generator = scale, np.random.default_rng(0)

    def run(self, length: float) -> np.ndarray:
        return self.generator.integers(VOCAB, size=max(1, round(length * self.scale)))

    def uniform(self, least: int, most: int) -> np.ndarray:
        return self.run(self.generator.uniform(least, most))

    def exponential(self, mean: int, most: int = 8192) -> np.ndarray:
        return self.run(min(self.generator.exponential(mean), most))


def stars(name: str, lengths: Lengths, groups: int, size: int, system: int = 0) -> Batch:
    """`groups` prompts with `size` completions each. system: tokens that all prompts begin with."""
    common = [lengths.run(system)] if system else []
    sequences = []
    for _ in range(groups):
        prompt = [*common, lengths.uniform(64, 1024)]
        sequences += [np.concatenate([*prompt, lengths.exponential(512)]) for _ in range(size)]
    return Batch(name, sequences, groups)


def combs(name: str, lengths: Lengths, prompts: int, trials: int, turns: int) -> Batch:
    """`trials` conversations per prompt of 2 to `turns` turns, an answer and a reply each; every turn is a sequence."""
    sequences = []
    for _ in range(prompts):
        prompt = lengths.uniform(256, 1024)
        for _ in range(trials):
            context = prompt
            for _ in range(int(lengths.generator.integers(2, turns + 1))):
                sequences.append(np.concatenate([context, lengths.exponential(128)]))
                context = np.concatenate([sequences[-1], lengths.exponential(256)])
    return Batch(name, sequences, prompts)


def giant(name: str, lengths: Lengths, leaves: int) -> Batch:
    """One tree that grows by giving a random leaf two to four continuations, as tree search does."""
    paths = [lengths.run(512)]
    while len(paths) < leaves:
        path = paths.pop(int(lengths.generator.integers(len(paths))))
        paths += [
            np.concatenate([path, lengths.exponential(192)]) for _ in range(int(lengths.generator.integers(2, 5)))
        ]
    return Batch(name, paths[:leaves], 1)


def all_tasks(path: Path) -> Batch:
    """Every assistant turn of every recorded trajectory; all begin with the same system prompt."""
    with gzip.open(path, "rt") as file:
        trajectories = [json.loads(line) for line in file]
    encode = encoder(trajectories, VOCAB)
    sequences = [tokens for trajectory in trajectories for tokens, _, _ in turns_of(trajectory, encode)]
    return Batch("rollouts, all tasks", sequences, len({trajectory["task_id"] for trajectory in trajectories}))


def one_task(path: Path) -> Batch:
    """The turns of one task's trials; see common/workloads.py."""
    return Batch("rollouts, one task", [row.numpy() for row in rollouts(path, VOCAB).sequences], 1)


def synthetic(smoke: bool) -> dict[str, Callable[[], Batch]]:
    """By name, built when called."""
    shapes: dict[str, tuple[Callable[..., Batch], tuple[int, ...]]]
    if smoke:
        shapes = {"16 x 4": (stars, (16, 4)), "combs 6 x 2": (combs, (6, 2, 4)), "one tree": (giant, (24,))}
    else:
        shapes = {f"{groups} x {size}": (stars, (groups, size)) for groups, size in STARS}
        shapes |= {f"{groups} x {size}, system prompt": (stars, (groups, size, 128)) for groups, size in SYSTEM}
        shapes |= {f"combs {prompts} x {trials}": (combs, (prompts, trials, 12)) for prompts, trials in COMBS}
        shapes["one tree"] = (giant, (512,))
    scale = 1 / 16 if smoke else 1.0
    return {name: partial(build, name, Lengths(scale), *shape) for name, (build, shape) in shapes.items()}
