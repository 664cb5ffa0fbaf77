"""The Triton kernels on 5,000 random trees, in forests of fifty: every variant, many sizes of tiles, both passes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dta_plugin.attention import tiles, triton_backend
from dta_plugin.attention.triton_table import Launch, Launches
from tests.support.trees import FIRST_TOKEN, Sequences
from tests.support.triton_checks import VARIANTS, check, poisoned_memory

__all__ = ["poisoned_memory"]

TREES = 50
TILES = [(32, 16), (16, 32), (32, 32), (64, 32), (32, 64)]


def random_tree(generator: random.Random) -> Sequences:
    """Sequences that continue, end inside, repeat or ignore an earlier one; one tree in thirty is large."""
    longest = 60 if generator.random() < 1 / 30 else 4
    batch: Sequences = []
    for _ in range(generator.randint(1, 5)):
        base = generator.choice([[], *batch])
        kept = base[: generator.randint(0, len(base))]
        batch.append(kept + [generator.randrange(3) for _ in range(generator.randint(0, longest))])
    return batch


def random_forest(seed: int) -> Sequences:
    generator = random.Random(seed)
    return [[FIRST_TOKEN + root, *tail] for root in range(TREES) for tail in random_tree(generator)]


def check_forest(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    forward, queries, keys, values = (Launch(*TILES[(seed // n) % len(TILES)], 4, 2) for n in (1, 2, 3, 5))
    queries = replace(queries, described=seed % 2 == 0)
    sizes = Launches(forward, queries, keys, values if seed % 3 else None)
    monkeypatch.setattr(triton_backend, "launches", lambda *_: sizes)
    monkeypatch.setattr(tiles, "_FEWEST_VISITS", 1 + seed % 5)
    options = list(VARIANTS.values())[seed % len(VARIANTS)]
    heads = {"q_heads": 2 if seed % 3 == 0 else 1, "kv_heads": 1}
    check(random_forest(seed), replace(options, **heads), torch.float32 if seed % 4 else torch.bfloat16)


@pytest.mark.parametrize("seed", range(30))
def test_random_forests(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check_forest(monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 600))
def test_more_random_forests(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check_forest(monkeypatch, seed)
