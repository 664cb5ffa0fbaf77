"""Chats as files have them -> messages that every encoder can rely on.

In: role and content, or ShareGPT's from and value; content as a text, a list of parts or JSON; tool calls as a list or
a single one, nested under "function" or not. Null means absent.
Out: {"role": str, "content": str, "tool_calls": [{"name": str, "arguments": str or JSON}, ..], ..}, `tool_calls` only
where there are any, and whatever else the message has.
"""

from __future__ import annotations

import json
from typing import Any

from dta_plugin.errors import InvalidInputError

Message = dict[str, Any]

_ROLES = {  # ShareGPT's names
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_READ_HERE = ("role", "from", "content", "value", "tool_calls", "function_call")


def read_messages(values: Any, where: str) -> list[Message]:
    """The messages of a chat. Raises InvalidInputError naming the place and the message."""
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InvalidInputError(
            f"{where} has messages that are no list of objects with a role. Expected role, content."
        )
    return [_message(value, f"{where}, message {number}") for number, value in enumerate(values, 1)]


def _message(value: dict[str, Any], where: str) -> Message:
    value = {key: item for key, item in value.items() if item is not None}
    role = value["role"] if "role" in value else value.get("from")
    if not isinstance(role, str) or not role:
        raise InvalidInputError(
            f"{where} has the keys {', '.join(value) or 'of an empty object'}. Expected a role (or ShareGPT's from), "
            "which is a text."
        )
    message = {key: item for key, item in value.items() if key not in _READ_HERE}
    message["role"] = role if "role" in value else _ROLES.get(role, role)
    message["content"] = _content(value["content"] if "content" in value else value.get("value"), where)
    calls = value.get("tool_calls") or value.get("function_call")
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_call(call, where) for call in calls if call is not None]
    return message


def _content(content: Any, where: str) -> str:
    """The content as text; a list of parts is joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content, 1))
    return json.dumps(content, default=str)


def _part(part: Any, where: str) -> str:
    if part is None:
        return ""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        held = {key: item for key, item in part.items() if item is not None}
        if isinstance(held.get("text"), str):
            return held["text"]
        if isinstance(held.get("type"), str) and len(held) == 1:  # TRL's logs leave the image itself out
            return f"<|{held['type']}|>"
        kind = f"an object with the keys {', '.join(held) or '(none)'}"
    else:
        kind = f"a {type(part).__name__}"
    raise InvalidInputError(f"{where} is {kind}. Expected text; what else a model is shown needs token ids.")


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call, in OpenAI's nesting under "function" or without it."""
    function = (call.get("function") or call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInputError(f"{where} has a tool call without a name. Expected a function with name and arguments.")
    arguments = function.get("arguments")
    return {"name": function["name"], "arguments": "" if arguments is None else arguments}
