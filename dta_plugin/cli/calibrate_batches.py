"""The batches that `dta calibrate FILE` times: a user's own rollouts, alone and together, cut to what time allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dta_plugin.calibrate import Case
from dta_plugin.cli.encoding import load_encoder
from dta_plugin.cli.rollouts import read_file, trajectory_sequences
from dta_plugin.cli.verify_batches import excerpt_start
from dta_plugin.errors import InvalidInputError

_GROUPS = 3  # timed each by itself
_COUNTS = (2, 8, 32)  # rollouts of a group together
_APART = 8  # groups that give one rollout each to a batch


@dataclass(frozen=True, slots=True)
class RolloutBatches:
    """Groups of rollouts, the largest first, and where they come from in words."""

    groups: list[Case]
    origin: str

    def cases(self, tokens: int) -> Iterator[Case]:
        """Batches of at most about `tokens` dense tokens, at least four that differ in what they ask for."""
        longest = max((_one(group) for group in self.groups), key=lambda case: len(case.sequences[0]))
        sequence = longest.sequences[0]
        half = sequence[: max(2, tokens // 2)]
        yield Case("next to nothing", [sequence[:2]], [1])
        yield Case("the beginning of a rollout", [sequence[: max(2, tokens // 32)]], [1])
        yield Case("one rollout, all scored", [half], [1])
        yield Case("one rollout, little scored", [half], [len(half) - max(1, len(half) // 16)])
        if len(self.groups) > 1:
            apart = [_one(group) for group in self.groups[:_APART]]
            yield _together(f"{len(apart)} groups, a rollout of each", apart, tokens)
        for group in self.groups[:_GROUPS]:
            size = len(group.sequences)
            for count in sorted({min(count, size) for count in _COUNTS} - {1}):
                yield _excerpt(f"{count} of group {group.name}", group, count, tokens)
            if size > 1:
                yield _excerpt(f"{size} of group {group.name}, short", group, size, tokens // 4)


def file_batches(file: str, tokenizer: str | None, limit: int) -> RolloutBatches:
    """The first `limit` rollouts of a file. Raises InvalidInputError naming file and line."""
    found = read_file(file, None, limit)
    encoder = load_encoder(tokenizer)
    groups: dict[str, Case] = {}
    for sequence in trajectory_sequences(found.rollouts, encoder):
        if len(sequence.tokens) > 1:  # the first token has no log-prob
            group = groups.setdefault(sequence.group, Case(sequence.group, [], []))
            group.sequences.append(sequence.tokens)
            group.first_scored.append(min(sequence.first_scored, len(sequence.tokens) - 1))
    if not groups:
        raise InvalidInputError(f"{file} has no rollout of two tokens or more. Expected some that training would see.")
    kind = "token ids" if found.rollouts[0].tokens is not None else encoder.description
    largest = sorted(groups.values(), key=lambda group: -len(group.sequences))
    return RolloutBatches(largest, f"{len(found.rollouts)} rollouts in {len(groups)} groups; {kind}")


def _one(group: Case) -> Case:
    """The group's longest rollout."""
    longest = max(range(len(group.sequences)), key=lambda index: len(group.sequences[index]))
    return Case(group.name, [group.sequences[longest]], [group.first_scored[longest]])


def _together(name: str, cases: Sequence[Case], tokens: int) -> Case:
    rows = [row for case in cases for row in case.sequences]
    return _cut(name, rows, [first for case in cases for first in case.first_scored], 0, tokens)


def _excerpt(name: str, group: Case, count: int, tokens: int) -> Case:
    """Rollouts of a group, around the place where they part."""
    rows = group.sequences[:count]
    return _cut(name, rows, group.first_scored[:count], excerpt_start(rows, max(2, tokens // count)), tokens)


def _cut(name: str, rows: list[np.ndarray], first_scored: list[int], start: int, tokens: int) -> Case:
    """Each row's share of `tokens` from `start` on; a row that ends before has its last two tokens."""
    width = max(2, tokens // len(rows))
    starts = [min(start, len(row) - 2) for row in rows]
    cut = [row[begin : begin + width] for row, begin in zip(rows, starts, strict=True)]
    firsts = [
        min(max(1, first - begin), len(row) - 1) for first, begin, row in zip(first_scored, starts, cut, strict=True)
    ]
    return Case(name, cut, firsts)
