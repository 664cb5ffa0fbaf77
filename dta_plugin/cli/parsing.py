"""Rows -> rollouts. Every row is checked once, here; what comes after relies on it.

A row is a list of token ids, a list of messages, or an object with one of these, looked for in this order:

    prompt ids + completion ids      see _ID_PAIRS: prompt_ids + completion_ids, prompt_token_ids + token_ids, ..
    input_ids | tokens | token_ids   token ids; zeros of an `attention_mask` are dropped
    chosen + rejected                two rollouts, after `prompt` or what the two have in common
    messages | conversations         chats
    prompt + completion              texts, chats or token ids (see _PAIRS; `input` + `output` in verl's dumps)
    prompt + completions             a rollout per completion

Null means absent. `reward` or `score` is a number, or a list of one per rollout of the row; anything else is no reward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from dta_plugin.cli.messages import Message, read_messages
from dta_plugin.errors import InvalidInputError

_ID_PAIRS = (
    ("prompt_ids", "completion_ids"),
    ("prompt_ids", "response_ids"),
    ("prompt_token_ids", "completion_token_ids"),
    ("prompt_token_ids", "response_token_ids"),
    ("prompt_token_ids", "output_token_ids"),
    ("prompt_token_ids", "token_ids"),
)
_WHOLE_IDS = ("input_ids", "tokens", "token_ids")
_PREFERENCES = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
    ("prompt", "chosen", "rejected"),
)
_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("prompts", "responses"),
    ("input", "output"),
    ("prompt", "completions"),
    ("prompt", "responses"),
)
_REWARDS = ("reward", "score")
_MAX_ID = 2**32 - 1
_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sequence of a file. Exactly one of tokens, messages and text is set.

    tokens: token ids. messages: a chat, as cli/messages.py leaves it. text: (prompt, completion).
    prompt_length: tokens, or messages, that belong to the prompt; 0 if the file does not say. where: file and line.
    reward: None if the file does not say.
    """

    group: str
    tokens: np.ndarray | None = None
    messages: list[Message] | None = None
    text: tuple[str, str] | None = None
    prompt_length: int = 0
    where: str = ""
    reward: float | None = None


def parse_row(row: Any, where: str) -> list[Rollout]:
    """The rollouts of a row, without their group. Raises InvalidInputError naming the place."""
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return [_chat(row, where)]
    if isinstance(row, list):
        return [_from_ids([], row, None, where)]
    if not isinstance(row, dict):
        raise InvalidInputError(f"{where} is a {type(row).__name__}. Expected a list of token ids or an object.")
    found = list(_parse_object({key: value for key, value in row.items() if value is not None}, where))
    if not found:
        raise InvalidInputError(
            f"{where} has the keys {', '.join(row) or 'of an empty object'}. Expected token ids (prompt_ids and "
            "completion_ids, input_ids, tokens or token_ids), messages, or prompt and completion."
        )
    rewards = _rewards(row, len(found))
    return [replace(rollout, reward=reward) for rollout, reward in zip(found, rewards, strict=True)]


def _rewards(row: dict[str, Any], count: int) -> list[float | None]:
    """One per rollout of the row."""
    given = next((row[key] for key in _REWARDS if row.get(key) is not None), None)
    values = given if isinstance(given, list) and len(given) == count else [given] * count
    return [float(value) if isinstance(value, (int, float)) and abs(value) <= _LARGEST else None for value in values]


def _parse_object(row: dict[str, Any], where: str) -> Iterator[Rollout]:
    mask = row.get("attention_mask")
    for before, after in _ID_PAIRS:
        if before in row and after in row:
            yield _from_ids(row[before], row[after], mask, where)
            return
    for key in _WHOLE_IDS:
        if key in row:
            yield _from_ids([], row[key], mask, where)
            return
    for key, chosen, rejected in _PREFERENCES:
        if chosen in row and rejected in row:
            yield from _preference(row.get(key), row[chosen], row[rejected], where)
            return
    for key in _CHATS:
        if key in row:
            yield _chat(row[key], where, row.get("system"))
            return
    if "instruction" in row and "output" in row:  # Alpaca's
        asked = [row["instruction"], row.get("input", "")]
        yield _joined("\n".join(str(text) for text in asked if text), row["output"], mask, where)
        return
    for before, after in _PAIRS:
        if before in row and after in row:
            prompt = row[before]
            yield from (_joined(prompt, answer, mask, where) for answer in _answers(prompt, row[after]))
            return


def _answers(prompt: Any, completion: Any) -> list[Any]:
    """A prompt's completions: the one, or each of a list of texts, chats or rows of token ids."""
    if not isinstance(completion, list):
        return [completion]
    answers = [answer for answer in completion if answer is not None]
    is_batch = isinstance(prompt, list) and any(isinstance(item, list) for item in prompt)
    return answers if answers and isinstance(answers[0], (str, list)) and not is_batch else [completion]


def _joined(prompt: Any, completion: Any, mask: Any, where: str) -> Rollout:
    """A prompt and its completion: two texts, two lists of token ids, or chats, either of them possibly a text."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Rollout("", text=(prompt, completion), where=where)
    if isinstance(prompt, list) and isinstance(completion, list) and not any(map(_is_chat, (prompt, completion))):
        return _from_ids(prompt, completion, mask, where)
    if not any(map(_is_chat, (prompt, completion))):
        raise InvalidInputError(
            f"{where} has a {type(prompt).__name__} as prompt and a {type(completion).__name__} as completion. "
            "Expected two texts, two chats or two lists of token ids."
        )
    first = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    second = read_messages(completion, where)
    return Rollout("", messages=[*first, *second], prompt_length=len(first), where=where)


def _is_chat(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _chat(values: Any, where: str, system: Any = None) -> Rollout:
    """A chat; all before the first answer is its prompt. system: ShareGPT's, beside the messages."""
    messages = read_messages(values, where)
    if not messages:
        raise InvalidInputError(f"{where} has no messages. Expected at least one.")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    answers = (index for index, message in enumerate(messages) if message["role"] == "assistant")
    return Rollout("", messages=messages, prompt_length=next(answers, 0), where=where)


def _preference(prompt: Any, chosen: Any, rejected: Any, where: str) -> Iterator[Rollout]:
    """The two answers, each after the prompt; where the file names none, it is what both begin with."""
    answers = [chosen, rejected]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        kinds = f"a {type(chosen).__name__} and a {type(rejected).__name__}"
        raise InvalidInputError(
            f"{where} has {kinds} as chosen and rejected. Expected two texts, chats or lists of ids."
        )
    contains_prompt = isinstance(prompt, str) and all(
        _is_chat(answer) and any(isinstance(item, dict) and item.get("content") == prompt for item in answer)
        for answer in answers
    )
    if prompt is None or contains_prompt:
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        prompt, answers = chosen[:common], [answer[common:] for answer in answers]
    yield from (_joined(prompt, answer, None, where) for answer in answers)


def _from_ids(prompt: Any, completion: Any, mask: Any, where: str) -> Rollout:
    first, second = _ids(prompt, where), _ids(completion, where)
    ids, length = np.concatenate([first, second]), len(first)
    if mask is not None:
        kept = _mask(mask, len(ids), where)
        ids, length = ids[kept], int(kept[:length].sum())
    if not len(ids):
        raise InvalidInputError(f"{where} is empty: no token ids. Expected at least one; drop empty rollouts.")
    if ids.min() < 0 or ids.max() > _MAX_ID:
        raise InvalidInputError(
            f"{where} has token ids from {ids.min()} to {ids.max()}. Expected ids in [0, {_MAX_ID}]; remove padding "
            "and ignore-index values such as -100."
        )
    return Rollout("", tokens=ids, prompt_length=length, where=where)


def _ids(values: Any, where: str) -> np.ndarray:
    kinds = sorted({type(value).__name__ for value in values}) if isinstance(values, list) else [type(values).__name__]
    if not isinstance(values, list) or any(kind != "int" for kind in kinds):
        what = "a batch of rows" if kinds == ["list"] else f"{', '.join(kinds)} values"
        raise InvalidInputError(
            f"{where} has token ids that are {what}. Expected a list of integers, one rollout a row."
        )
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError as error:
        raise InvalidInputError(f"{where} has token ids beyond 64 bits. Expected ids in [0, {_MAX_ID}].") from error


def _mask(values: Any, length: int, where: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != length or not all(value in (0, 1) for value in values):
        what = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise InvalidInputError(
            f"{where} has {what} as attention_mask. Expected 0 or 1 for each of {length} token ids."
        )
    return np.asarray(values, dtype=bool)
