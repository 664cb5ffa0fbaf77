"""Read rollouts from JSONL and turn them into token sequences: the reader of `dta inspect`, `dta verify`, benchmarks.

A line is a list of token ids, or an object with one of these, looked for in this order:

    prompt_ids + completion_ids             token ids
    input_ids | tokens | token_ids          token ids; zeros of an `attention_mask` are dropped
    messages                                role, content, optional tool_calls
    prompt + completion | input + output    texts, or lists of messages (TRL, verl's rollout_data_dir)

Rollouts of one group answer the same prompt. The group is read from the first of GROUP_KEYS that the first object has,
or from the key that the caller names; failing that, rollouts with equal prompts are a group.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dta_plugin.cli.encoding import ByteEncoder, Message
from dta_plugin.errors import InvalidInputError

GROUP_KEYS = ("group", "group_id", "task_id", "prompt_id", "uid", "problem_id")
_WHOLE_IDS = ("input_ids", "tokens", "token_ids")
_PAIRS = (("prompt", "completion"), ("input", "output"))


@dataclass(frozen=True, slots=True)
class Rollout:
    """One line of a file. Exactly one of tokens, messages and text is set.

    tokens: token ids. messages: a chat. text: (prompt, completion).
    prompt_length: tokens, or messages, that belong to the prompt; 0 if the file does not say.
    """

    group: str
    tokens: np.ndarray | None = None
    messages: list[Message] | None = None
    text: tuple[str, str] | None = None
    prompt_length: int = 0


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """What training computes. tokens: int [n]. first_scored: the first token that the loss needs, at least 1."""

    group: str
    tokens: np.ndarray
    first_scored: int = 1


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """The rollouts of a file and what tells their groups apart: a key, or "equal prompts"."""

    rollouts: list[Rollout]
    grouped_by: str


def load_rollouts(path: str | Path, group_by: str | None = None, limit: int | None = None) -> list[Rollout]:
    """The rollouts of a .jsonl or .jsonl.gz file, at most `limit`. Raises InvalidInputError naming the line."""
    return read_file(path, group_by, limit).rollouts


def read_file(path: str | Path, group_by: str | None = None, limit: int | None = None) -> RolloutFile:
    """As `load_rollouts`, and how the groups were told apart."""
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit={limit}. Expected at least 1 rollout.")
    rollouts: list[Rollout] = []
    prompts: dict[str, str] = {}
    for number, row in _lines(Path(path)):
        where = f"{path}, line {number}"
        if not rollouts and group_by is None and isinstance(row, dict):
            group_by = next((key for key in GROUP_KEYS if key in row), None)
        parsed = _parse(row, where)
        if group_by is None:
            group = prompts.setdefault(_prompt_of(parsed), str(len(prompts) + 1))
        elif isinstance(row, dict) and group_by in row:
            group = str(row[group_by])
        else:
            has = f"the keys {', '.join(row)}" if isinstance(row, dict) else "a bare list"
            raise InvalidInputError(f"{where} has {has}. Expected {group_by!r}, the key of its group; see --group-by.")
        rollouts.append(Rollout(group, parsed.tokens, parsed.messages, parsed.text, parsed.prompt_length))
        if len(rollouts) == limit:
            break
    if not rollouts:
        raise InvalidInputError(f"{path} holds no rollouts. Expected one JSON value per line; see dta inspect --help.")
    return RolloutFile(rollouts, group_by or "equal prompts")


def trajectory_sequences(rollouts: Iterable[Rollout], encoder: ByteEncoder) -> list[TokenizedSequence]:
    """One sequence per rollout, scored after its prompt."""
    return [_sequence(rollout.group, *_encode(rollout, encoder)) for rollout in rollouts]


def per_turn_sequences(rollouts: Iterable[Rollout], encoder: ByteEncoder) -> list[TokenizedSequence]:
    """One sequence per assistant turn, as agentic RL trains: all that came before, and that turn, which is scored."""
    sequences = []
    for rollout in rollouts:
        if rollout.messages is None:
            raise InvalidInputError("--per-turn needs to know the turns. Expected `messages` in every line.")
        for turn, message in enumerate(rollout.messages):
            if message["role"] == "assistant":
                sequences.append(_sequence(rollout.group, *encoder.chat(rollout.messages[: turn + 1], turn)))
    if not sequences:
        raise InvalidInputError("No message has the role 'assistant'. Expected at least one assistant turn.")
    return sequences


def _sequence(group: str, tokens: np.ndarray, prompt: int) -> TokenizedSequence:
    return TokenizedSequence(group, tokens, max(1, prompt))


def _encode(rollout: Rollout, encoder: ByteEncoder) -> tuple[np.ndarray, int]:
    if rollout.tokens is not None:
        return rollout.tokens, rollout.prompt_length
    if rollout.messages is not None:
        return encoder.chat(rollout.messages, rollout.prompt_length)
    assert rollout.text is not None
    return encoder.text(*rollout.text)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of every line that is not blank."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{path}, line {number} is not JSON: {error}. Expected one value per line.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidInputError(f"{path} cannot be read: {reason}. Expected a .jsonl or .jsonl.gz file.") from error


def _parse(row: Any, where: str) -> Rollout:
    """A rollout without its group."""
    if isinstance(row, list):
        return Rollout("", tokens=_ids(row, where))
    if not isinstance(row, dict):
        raise InvalidInputError(f"{where} is a {type(row).__name__}. Expected a list of token ids or an object.")
    if "prompt_ids" in row and "completion_ids" in row:
        prompt, completion = _ids(row["prompt_ids"], where), _ids(row["completion_ids"], where)
        return Rollout("", tokens=np.concatenate([prompt, completion]), prompt_length=len(prompt))
    for key in _WHOLE_IDS:
        if key in row:
            ids, mask = _ids(row[key], where), np.asarray(row.get("attention_mask", True), dtype=bool)
            return Rollout("", tokens=ids[np.broadcast_to(mask, ids.shape)])
    if "messages" in row:
        messages = _messages(row["messages"], where)
        answers = (index for index, message in enumerate(messages) if message["role"] == "assistant")
        return Rollout("", messages=messages, prompt_length=next(answers, 0))
    for before, after in _PAIRS:
        if before in row and after in row:
            return _parse_pair(row[before], row[after], where)
    raise InvalidInputError(
        f"{where} has the keys {', '.join(row) or 'of an empty object'}. Expected token ids (prompt_ids and "
        "completion_ids, input_ids, tokens or token_ids), messages, or prompt and completion."
    )


def _parse_pair(prompt: Any, completion: Any, where: str) -> Rollout:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Rollout("", text=(prompt, completion))
    first, second = _messages(prompt, where), _messages(completion, where)
    return Rollout("", messages=[*first, *second], prompt_length=len(first))


def _ids(values: Any, where: str) -> np.ndarray:
    ids = np.asarray(values if isinstance(values, Sequence) else [values])
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidInputError(
            f"{where} has token ids of shape {ids.shape}, {ids.dtype}. Expected a list of integers."
        )
    return ids


def _messages(values: Any, where: str) -> list[Message]:
    if not isinstance(values, list) or not all(isinstance(value, dict) and "role" in value for value in values):
        raise InvalidInputError(
            f"{where} has messages that are no list of objects with a role. Expected role, content."
        )
    if not values:
        raise InvalidInputError(f"{where} has no messages. Expected at least one.")
    return values


def _prompt_of(rollout: Rollout) -> str:
    """What rollouts with the same prompt have in common; bare token ids do not say, and are one group."""
    if rollout.messages is not None:
        return json.dumps(rollout.messages[: rollout.prompt_length])
    if rollout.text is not None:
        return rollout.text[0]
    assert rollout.tokens is not None
    return str(rollout.tokens[: rollout.prompt_length].tolist())
