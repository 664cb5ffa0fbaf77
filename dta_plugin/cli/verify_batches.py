"""The batches that `dta verify` runs: random tokens, or a user's own rollouts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from dta_plugin.cli.encoding import load_encoder
from dta_plugin.cli.rollouts import Grouping, Rollout, iter_rollouts, trajectory_sequences
from dta_plugin.cli.terminal import progress
from dta_plugin.tree import PrefixTree
from dta_plugin.tree.divergence import first_fork_depth


@dataclass(frozen=True, slots=True)
class VerifyBatch:
    """Token sequences, and where they come from in words."""

    sequences: list[np.ndarray]
    origin: str


def random_batch(vocabulary: int, max_tokens: int) -> VerifyBatch:
    """Six answers of different lengths to one prompt, and two ways on from the first: it ends inside the tree."""
    generator = np.random.default_rng(0)
    unit = min(64, max_tokens // 8)

    def draw(units: int) -> np.ndarray:
        return generator.integers(0, vocabulary, units * unit)

    prompt = draw(4)
    answers = [np.concatenate([prompt, draw(1 + index % 3)]) for index in range(6)]
    answers += [np.concatenate([answer, draw(1)]) for answer in (answers[0], answers[0])]
    return VerifyBatch(answers, "8 random sequences that share a prompt (seeded)")


def file_batch(file: str, tokenizer: str | None, limit: int, max_tokens: int) -> VerifyBatch:
    """`limit` rollouts, group by group, cut to the tokens around the place where they first part."""
    rollouts = _first_groups(file, limit)
    encoder = load_encoder(tokenizer)
    sequences = [sequence.tokens for sequence in trajectory_sequences(rollouts, encoder)]
    start = excerpt_start(sequences, max_tokens)
    cut = [tokens[start : start + max_tokens] for tokens in sequences]
    cut = [tokens for tokens in cut if len(tokens)]
    kind = "token ids" if rollouts[0].tokens is not None else encoder.description
    return VerifyBatch(cut, f"{len(cut)} rollouts, tokens {start:,} to {start + max_tokens:,}; {kind}")


def excerpt_start(sequences: list[np.ndarray], width: int) -> int:
    """Where `width` tokens begin that have the place where the sequences first part in their middle."""
    parting = first_fork_depth(PrefixTree.from_sequences(sequences)) or 0
    return max(0, parting - width // 2)


def _first_groups(file: str, limit: int) -> list[Rollout]:
    """`limit` rollouts, group by group; no more is read once the first group has as many."""
    groups: dict[str, list[Rollout]] = {}
    with closing(iter_rollouts(file, Grouping(None))) as found:
        for rollout in progress(found, "rollouts"):
            groups.setdefault(rollout.group, []).append(rollout)
            if len(next(iter(groups.values()))) == limit:
                break
    return list(islice(chain.from_iterable(groups.values()), limit))
