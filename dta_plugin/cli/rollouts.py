"""A file's rollouts and their groups, and the token sequences that they become: what `dta` reads.

Which files: cli/containers.py. Which rows: cli/parsing.py. Rollouts of one group answer the same prompt. The group is
read from the first of GROUP_KEYS that the first object has, or from the key that the caller names; failing that,
rollouts with equal prompts are a group.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dta_plugin.cli.containers import rows
from dta_plugin.cli.encoding import ByteEncoder
from dta_plugin.cli.file_kinds import READ
from dta_plugin.cli.parsing import Rollout, parse_row
from dta_plugin.cli.rewards import Rewards, at
from dta_plugin.cli.terminal import progress, reason
from dta_plugin.errors import InvalidInputError

GROUP_KEYS = (
    *("group", "group_id", "group_index", "task_id", "prompt_id", "uid", "problem_id"),
    *("example_id", "question_id", "query_id", "qid"),
)
EQUAL_PROMPTS = "equal prompts"  # in the place of a key


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """What training computes. tokens: int [n]. first_scored: the first token that the loss needs, at least 1.

    where: file, line and, of a single turn, its number. reward: of the whole rollout, None if the file does not say.
    """

    group: str
    tokens: np.ndarray
    first_scored: int = 1
    where: str = ""
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """The rollouts of a file, what tells their groups apart (a key, or EQUAL_PROMPTS), and where rewards came from."""

    rollouts: list[Rollout]
    grouped_by: str
    rewards: Rewards


def read_file(
    path: str | Path, group_by: str | None = None, limit: int | None = None, reward: str | None = None
) -> RolloutFile:
    """The rollouts of a file or folder, at most `limit`. reward: see cli/rewards.py.

    Raises InvalidInputError naming file and line.
    """
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit={limit}. Expected at least 1 rollout.")
    grouping, rewards = Grouping(group_by), Rewards(reward)
    with closing(iter_rollouts(path, grouping, rewards)) as found:
        rollouts = list(progress(islice(found, limit), "rollouts"))
    rewards.check()
    return RolloutFile(rollouts, grouping.key or EQUAL_PROMPTS, rewards)


class Grouping:
    """Names the group of every rollout. key: what the groups are told apart by, None for equal prompts."""

    def __init__(self, key: str | None) -> None:
        self.key = None if key == EQUAL_PROMPTS else key
        self._prompts: dict[str, str] = {}
        self._is_first = key is None

    def name_group(self, row: Any, rollout: Rollout) -> str:
        if self._is_first and isinstance(row, dict):
            self.key = next((key for key in GROUP_KEYS if row.get(key) is not None), None)
        self._is_first = False
        if self.key is None:
            return self._prompts.setdefault(_prompt_of(rollout), str(len(self._prompts) + 1))
        if (name := at(row, self.key)) is not None:
            return str(name)
        has = f"the keys {', '.join(row)}" if isinstance(row, dict) else "a bare list"
        raise InvalidInputError(
            f"{rollout.where} has {has}. Expected {self.key!r}, the key of its group; see --group-by."
        )


def iter_rollouts(path: str | Path, grouping: Grouping, rewards: Rewards | None = None) -> Generator[Rollout]:
    """The rollouts of a file, read as they are asked for; at least one. rewards: reads theirs; None: nobody asks."""
    has_ids: bool | None = None
    for where, row in rows(path):
        try:
            parsed = [replace(rollout, group=grouping.name_group(row, rollout)) for rollout in parse_row(row, where)]
            if rewards is not None:
                found = zip(parsed, rewards.read(row, len(parsed), where), strict=True)
                parsed = [replace(rollout, reward=reward) for rollout, reward in found]
        except InvalidInputError:
            raise
        except Exception as error:  # the last resort names the line, too
            raise InvalidInputError(f"{where} cannot be used: {type(error).__name__}: {reason(error)}.") from error
        for rollout in parsed:
            if has_ids is not None and has_ids != (rollout.tokens is not None):
                kinds = ("texts", "token ids")
                raise InvalidInputError(f"{where} holds {kinds[not has_ids]}, the lines before {kinds[has_ids]}.")
            has_ids = rollout.tokens is not None
            yield rollout
    if has_ids is None:
        name = "standard input" if str(path) == "-" else path
        is_empty = Path(path).is_file() and not Path(path).stat().st_size
        what = "is empty (0 bytes): it holds no rollouts" if is_empty else "holds no rollouts"
        raise InvalidInputError(f"{name} {what}. Expected {READ}, one JSON value per line; see dta inspect --help.")


def trajectory_sequences(rollouts: Iterable[Rollout], encoder: ByteEncoder) -> list[TokenizedSequence]:
    """One sequence per rollout, scored after its prompt."""
    return [_sequence(rollout, *_encode(rollout, encoder)) for rollout in progress(rollouts, "rollouts encoded")]


def per_turn_sequences(rollouts: Iterable[Rollout], encoder: ByteEncoder) -> list[TokenizedSequence]:
    """One sequence per assistant turn, as agentic RL trains: all that came before, and that turn, which is scored."""
    sequences = []
    for rollout in progress(rollouts, "rollouts encoded"):
        if rollout.messages is None:
            raise InvalidInputError("--per-turn needs to know the turns. Expected `messages` in every line.")
        for turn, message in enumerate(rollout.messages):
            if message["role"] == "assistant":
                where = f"{rollout.where}, message {turn + 1}"
                upto = replace(rollout, messages=rollout.messages[: turn + 1], prompt_length=turn, where=where)
                sequences.append(_sequence(upto, *_encode(upto, encoder)))
    if not sequences:
        raise InvalidInputError("No message has the role 'assistant'. Expected at least one assistant turn.")
    return sequences


def _sequence(rollout: Rollout, tokens: np.ndarray, prompt: int) -> TokenizedSequence:
    if not len(tokens):
        raise InvalidInputError(f"{rollout.where} is empty: no tokens. Expected at least one; drop empty rollouts.")
    return TokenizedSequence(rollout.group, tokens, max(1, prompt), rollout.where, rollout.reward)


def _encode(rollout: Rollout, encoder: ByteEncoder) -> tuple[np.ndarray, int]:
    if rollout.tokens is not None:
        return rollout.tokens, rollout.prompt_length
    try:
        if rollout.messages is not None:
            return encoder.chat(rollout.messages, rollout.prompt_length)
        assert rollout.text is not None
        return encoder.text(*rollout.text)
    except Exception as error:  # whatever a tokenizer or its template raises
        raise InvalidInputError(f"{rollout.where} cannot be encoded: {reason(error)}") from error


def _prompt_of(rollout: Rollout) -> str:
    """What rollouts with the same prompt have in common; bare token ids do not say, and are one group."""
    if rollout.messages is not None:
        return json.dumps(rollout.messages[: rollout.prompt_length], default=str)
    if rollout.text is not None:
        return rollout.text[0]
    assert rollout.tokens is not None
    return str(rollout.tokens[: rollout.prompt_length].tolist())
