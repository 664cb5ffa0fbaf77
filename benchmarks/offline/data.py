"""Offline batches: recorded conversations for SFT, preference pairs for DPO, as text of a made-up vocabulary."""

from __future__ import annotations

import random
from dataclasses import dataclass

from datasets import Dataset

from benchmarks.common.words import text


@dataclass(frozen=True, slots=True)
class Batch:
    """One update. kind: "sft" or "dpo". rows: of the data set, which are one batch of the trainer."""

    name: str
    kind: str
    rows: list[dict[str, str]]

    @property
    def data(self) -> Dataset:
        return Dataset.from_list(self.rows)


def conversation(turns: int, length: int, vocab: int) -> Batch:
    """SFT on every turn of a recorded conversation: row i is the text before turn i as its prompt, and the turn."""
    words = _words(turns * length, vocab)
    cuts = [index * length for index in range(1, turns)]
    rows = [{"prompt": text(words[:cut]), "completion": " " + text(words[cut : cut + length])} for cut in cuts]
    return Batch(f"SFT, {turns - 1} turns of {length}, a row per turn", "sft", rows)


def pairs(prompt: int, answer: int, count: int, vocab: int) -> Batch:
    """DPO on `count` pairs of answers to one prompt, all different."""
    start = text(_words(prompt, vocab))
    rows = [
        {"prompt": start, "chosen": _answer(answer, vocab, 2 * i), "rejected": _answer(answer, vocab, 2 * i + 1)}
        for i in range(count)
    ]
    return Batch(f"DPO, {count} pairs, {prompt} + {answer}", "dpo", rows)


def unrelated(length: int, count: int, vocab: int) -> Batch:
    """SFT on rows that share nothing."""
    texts = [_words(2 * length, vocab, seed) for seed in range(count)]
    rows = [{"prompt": text(words[:length]), "completion": " " + text(words[length:])} for words in texts]
    return Batch(f"SFT, {count} unrelated rows of {2 * length}", "sft", rows)


def _answer(length: int, vocab: int, seed: int) -> str:
    return " " + text(_words(length, vocab, seed + 1))


def _words(count: int, vocab: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab - 2) for _ in range(count)]
