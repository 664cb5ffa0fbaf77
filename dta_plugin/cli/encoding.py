"""Rollouts as text or messages -> token ids.

An encoder splits every text at the end of the prompt and encodes the two parts apart, as RL training does: the prompt
is tokenised, the completion comes from the policy. With a tokenizer that has a chat template, messages go through it;
otherwise they are rendered plainly, one message after the other:

    <|role|>
    content
    <|call|>name arguments        (one line per tool call)
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dta_plugin.cli.messages import Message
from dta_plugin.cli.model_loading import check_exists
from dta_plugin.cli.terminal import reason
from dta_plugin.errors import InvalidInputError

_EXPECTED = "Expected a folder, a tokenizer.json or a model name of the Hugging Face hub."


class ByteEncoder:
    """UTF-8 bytes as tokens, for when no tokenizer is given. Sharing ratios come close to a tokenizer's."""

    description = "UTF-8 bytes as tokens, about 4 per real token (give --tokenizer for real counts)"
    run_length = 64  # a repetition of about ten words; see tree/divergence.py

    def __init__(self) -> None:
        self._cache: dict[str, np.ndarray] = {}

    def text(self, prompt: str, completion: str) -> tuple[np.ndarray, int]:
        """(token ids [n], number of prompt tokens)."""
        first = self._encode(prompt)
        return np.concatenate([first, self._encode(completion)]), len(first)

    def chat(self, messages: list[Message], prompt: int) -> tuple[np.ndarray, int]:
        """(token ids [n], number of prompt tokens); the first `prompt` messages are the prompt."""
        pieces = [self._cached(render(message)) for message in messages]
        return np.concatenate(pieces), sum(len(piece) for piece in pieces[:prompt])

    def decode(self, token_ids: list[int], /) -> str:
        return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)

    def _cached(self, text: str) -> np.ndarray:
        """Conversations repeat their messages turn by turn, so most have been encoded before."""
        if text not in self._cache:
            self._cache[text] = self._encode(text)
        return self._cache[text]


class TokenizerEncoder(ByteEncoder):
    """A Hugging Face tokenizer, with its chat template if it has one."""

    run_length = 16

    def __init__(self, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.description = f"tokens of {name}" + ("" if self.has_template else ", messages role-tagged (no template)")

    def chat(self, messages: list[Message], prompt: int) -> tuple[np.ndarray, int]:
        if not self.has_template:
            return super().chat(messages, prompt)
        conversation = [_for_template(message) for message in messages]
        whole = self._render(conversation, continued=False)
        asked = self._render(conversation[:prompt], continued=True) if prompt else ""
        cut = len(os.path.commonprefix([whole, asked]))
        return self.text(whole[:cut], whole[cut:])

    def decode(self, token_ids: list[int], /) -> str:
        return self.tokenizer.decode(token_ids)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(_whole(text), add_special_tokens=False), dtype=np.int64)

    def _render(self, conversation: list[Message], continued: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=continued)
        except Exception as error:  # a template is a program
            roles = ", ".join(message["role"] for message in conversation[:6])
            raise InvalidInputError(
                f"The tokenizer's chat template refuses a conversation (roles {roles}..): {reason(error)}. Expected "
                "messages that the template knows; inspect token ids instead, or leave --tokenizer out."
            ) from error


def load_encoder(tokenizer: str | None) -> ByteEncoder:
    """tokenizer: a folder, a tokenizer.json, or a model name of the Hugging Face hub; None for bytes."""
    if tokenizer is None:
        return ByteEncoder()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    check_exists(tokenizer, _EXPECTED)
    logging.set_verbosity_error()  # a conversation may well be longer than the tokenizer thinks
    try:
        if Path(tokenizer).is_file():
            return TokenizerEncoder(PreTrainedTokenizerFast(tokenizer_file=tokenizer), tokenizer)
        return TokenizerEncoder(AutoTokenizer.from_pretrained(tokenizer), tokenizer)
    except Exception as error:
        raise InvalidInputError(
            f"No tokenizer could be loaded from {tokenizer!r}: {reason(error)} {_EXPECTED}"
        ) from error


def render(message: Message) -> str:
    """One message, as cli/messages.py leaves it, in the plain rendering; see the module's docstring."""
    lines = [f"<|{message['role']}|>", message["content"]]
    for call in message.get("tool_calls", ()):
        arguments = call["arguments"]
        lines.append(f"<|call|>{call['name']} {arguments if isinstance(arguments, str) else json.dumps(arguments)}")
    return "\n".join(lines) + "\n"


def _for_template(message: Message) -> Message:
    """The message as chat templates expect it: tool calls nested, arguments as an object."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["arguments"]
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # templates print a string that is no JSON as it is
                arguments = json.loads(arguments)
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return message | {"tool_calls": calls}


def _whole(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which no encoding has."""
    return text.encode("utf-8", errors="replace").decode()
