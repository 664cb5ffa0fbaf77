"""Rows -> rollouts. Every row is checked once, here; what comes after relies on it.

A row is a list of token ids, a list of messages, or an object with one of these, looked for in this order:

    prompt ids + completion ids      see _ID_PAIRS: prompt_ids + completion_ids, prompt_token_ids + token_ids, ..
    input_ids | tokens | token_ids   token ids; zeros of an `attention_mask` are dropped
    chosen + rejected                two rollouts, after `prompt` or what the two have in common
    messages | conversations         chats
    prompt + completion              texts, chats or token ids (see _PAIRS; `input` + `output` in verl's dumps)
    prompt + completions             a rollout per completion
    text                             a text whose prompt is not known

A chat that ends before its answer goes on with a `completion` or `response` beside it. Where whole token ids have their
prompt's length beside them (`response_length`, `loss_mask`, `labels`), it is read. Null means absent. Rewards:
cli/rewards.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from dta_plugin.cli.messages import Message, read_messages
from dta_plugin.cli.token_ids import prompt_length, read_ids
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
_ASKED = {"prompt", "prompts", "question", "query", "input", "instruction"}
_ANSWERS = ("completion", "response")  # beside a chat
_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("prompts", "responses"),
    ("input", "output"),
    ("prompt", "completions"),
    ("prompt", "responses"),
    ("prompt", "generations"),
    ("prompt", "samples"),
    ("prompt", "output"),
)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sequence of a file. Exactly one of tokens, messages and text is set.

    tokens: token ids. messages: a chat, as cli/messages.py leaves it. text: (prompt, completion).
    prompt_length: tokens, or messages, that belong to the prompt; 0 if the file does not say. where: file and line.
    reward: None if the file does not say; see cli/rewards.py.
    """

    group: str
    tokens: np.ndarray | None = None
    messages: list[Message] | None = None
    text: tuple[str, str] | None = None
    prompt_length: int = 0
    where: str = ""
    reward: float | None = None


def parse_row(row: Any, where: str) -> list[Rollout]:
    """The rollouts of a row, without their group and reward. Raises InvalidInputError naming the place."""
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
            f"completion_ids, input_ids, tokens or token_ids), messages, or prompt and completion.{_hint(row)}"
        )
    return found


def _hint(row: dict[str, Any]) -> str:
    """What could be done with a row that says nothing to us: its rollouts are a level deeper, or it has no answers."""
    if row.keys() & _ASKED:
        return " There is a prompt here, but no answer under these names: rename it, or sample answers first."
    for key, value in row.items():
        if isinstance(value, list) and _is_answered(value):
            return f" {key!r} holds a chat: rename it to messages."
        is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        for inner, filter_ in ((value, f".{key}"), (value[0] if is_list else None, f".{key}[]")):
            with suppress(InvalidInputError):
                if isinstance(inner, dict) or is_list:
                    parse_row(inner, "")
                    return f" What stands under {key!r} can be read: jq -c '{filter_}' FILE > rollouts.jsonl"
    return ""


def _parse_object(row: dict[str, Any], where: str) -> Iterator[Rollout]:
    mask = row.get("attention_mask")
    for before, after in _ID_PAIRS:
        if before in row and after in row:
            yield _from_ids(row[before], row[after], mask, where)
            return
    for key in _WHOLE_IDS:
        if key in row:
            cut = prompt_length(row, row[key])
            yield _from_ids(row[key][:cut] if cut else [], row[key][cut:] if cut else row[key], mask, where)
            return
    for key, chosen, rejected in _PREFERENCES:
        if chosen in row and rejected in row:
            yield from _preference(row.get(key), row[chosen], row[rejected], where)
            return
    for key in _CHATS:
        if key in row:
            answer = next((row[name] for name in _ANSWERS if name in row), None)
            if answer is not None and not _is_answered(row[key]):
                yield _joined(row[key], answer, mask, where)
            else:
                yield _chat(row[key], where, row.get("system"))
            return
    if "instruction" in row and "output" in row:  # Alpaca's
        asked = [row["instruction"], row.get("input", "")]
        yield _joined("\n".join(str(text) for text in asked if text), row["output"], mask, where)
        return
    for before, after in _PAIRS:
        if before in row and after in row:
            prompt = row[before]
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
                raise InvalidInputError(
                    f"{where} has {len(prompt)} texts as {before}: columns. Expected one rollout a row, as "
                    "to_json() of `datasets` writes them."
                )
            yield from (_joined(prompt, answer, mask, where) for answer in _answers(prompt, row[after]))
            return
    if isinstance(row.get("text"), str):
        yield Rollout("", text=("", row["text"]), where=where)


def _is_answered(values: Any) -> bool:
    """Whether a chat ends with an answer."""
    last = values[-1] if isinstance(values, list) and values else values
    return isinstance(last, dict) and (last.get("role") or last.get("from")) in ("assistant", "gpt", "model", "chatgpt")


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
    ids, length = read_ids(prompt, completion, mask, where)
    return Rollout("", tokens=ids, prompt_length=length, where=where)
