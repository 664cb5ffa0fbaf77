"""Rows of rollouts: what each means, and what is refused in one line that names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.cli.encoding import ByteEncoder, load_encoder
from dta_plugin.cli.rollouts import trajectory_sequences
from tests.cli.support import load_rollouts, parts, refusal, save_tokenizer, write_rollouts

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# What one row means: (prompt, completion) of each rollout; a chat as role: content, one message after the other.
MEANINGS: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {
    "ids": ([5, 6], [([], [5, 6])]),
    "response ids": ({"prompt_ids": [5], "response_ids": [6]}, [([5], [6])]),
    "vllm": ({"prompt_token_ids": [5], "token_ids": [6]}, [([5], [6])]),
    "verl batch": ({"prompts": [0, 5], "responses": [6, 0], "attention_mask": [0, 1, 1, 0]}, [([5], [6])]),
    "mask null": ({"input_ids": [5, 6], "attention_mask": None}, [([], [5, 6])]),
    "mask of bools": ({"input_ids": [5, 6], "attention_mask": [False, True]}, [([], [6])]),
    "completions of ids": ({"prompt": [5], "completions": [[6], [7, 8]]}, [([5], [6]), ([5], [7, 8])]),
    "completions": ({"prompt": "a", "completions": ["b", "c"]}, [("a", "b"), ("a", "c")]),
    "completions, chats": ({"prompt": [USER], "completions": [[ANSWER], [ANSWER]]}, [("user: a", "assistant: b")] * 2),
    "completion log": ({"step": 1, "prompt": "a", "completion": "b", "advantage": None}, [("a", "b")]),
    "dump": ({"input": "a", "output": "b", "gts": "4", "score": 1.0, "step": 3}, [("a", "b")]),
    "null messages": ({"messages": None, "prompt": "a", "completion": "b"}, [("a", "b")]),
    "messages": ({"messages": [USER, ANSWER]}, [("user: a", "assistant: b")]),
    "bare messages": ([USER, ANSWER], [("user: a", "assistant: b")]),
    "sharegpt": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [("system: s user: a", "assistant: b")],
    ),
    "chat and text": ({"prompt": [USER], "response": "b"}, [("user: a", "assistant: b")]),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, [("a\ni", "b")]),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, [("a", "b"), ("a", "c")]),
    "preference, no prompt": ({"chosen": "ab", "rejected": "ac"}, [("a", "b"), ("a", "c")]),
    "preference, ids": ({"chosen_ids": [5, 6], "rejected_ids": [5, 7]}, [([5], [6]), ([5], [7])]),
    "preference, whole chats": (
        {"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "c"}]},
        [("user: a", "assistant: b"), ("user: a", "assistant: c")],
    ),
    "content parts": (
        {"messages": [USER | {"content": [None, "x", {"type": "text", "text": "y"}, {"type": "image"}]}]},
        [("", "user: xy<|image|>")],
    ),
    "content as JSON": ({"messages": [{"role": "tool", "content": {"x": 1}}]}, [("", 'tool: {"x": 1}')]),
    "chat, then its completion": ({"messages": [USER], "completion": "b"}, [("user: a", "assistant: b")]),
    "chat, then its response": ({"messages": [USER], "response": [ANSWER]}, [("user: a", "assistant: b")]),
    "answered chat": ({"messages": [USER, ANSWER], "response": "b"}, [("user: a", "assistant: b")]),
    "generations": ({"prompt": "a", "generations": ["b", "c"]}, [("a", "b"), ("a", "c")]),
    "text": ({"text": "ab"}, [("", "ab")]),
    "response length": ({"tokens": [5, 6, 7], "response_length": 1, "loss_mask": [1]}, [([5, 6], [7])]),
    "loss mask": ({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 0]}, [([5], [6, 7])]),
    "labels": ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, [([5, 6], [7])]),
    "labels, padded": (
        {"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1]},
        [([5], [6])],
    ),
    "content null": ({"messages": [{"role": "tool", "content": None}]}, [("", "tool: ")]),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "2-D": ({"input_ids": [[5, 6], [7, 8]]}, "a batch of rows"),
    "ragged": ({"input_ids": [[5, 6], [7]]}, "a batch of rows"),
    "2-D row": ([[5, 6], [7]], "a batch of rows"),
    "2-D prompts": ({"prompts": [[5]], "responses": [[6]]}, "a batch of rows"),
    "bools": ({"input_ids": [True, False]}, "bool values"),
    "one bool": ({"input_ids": [5, True]}, "bool, int values"),
    "floats": ({"tokens": [5.0]}, "float values"),
    "null id": ({"tokens": [5, None]}, "NoneType, int values"),
    "ids as text": ({"prompt_ids": "5 6", "completion_ids": [7]}, "str values"),
    "one id": ({"input_ids": 5}, "int values"),
    "large ids": ({"tokens": [2**40]}, "token ids from 1099511627776"),
    "huge ids": ({"tokens": [10**30]}, "beyond 64 bits"),
    "all masked": ({"input_ids": [5], "attention_mask": [0]}, "is empty"),
    "mask too short": ({"input_ids": [5, 6, 7], "attention_mask": [1, 1]}, "2 values as attention_mask"),
    "mask of weights": ({"input_ids": [5, 6], "attention_mask": [0.5, 1]}, "as attention_mask"),
    "mask as text": ({"input_ids": [5, 6], "attention_mask": "11"}, "a str as attention_mask"),
    "null row": (None, "is a NoneType"),
    "all null": ({"messages": None}, "has the keys messages"),
    "no messages": ({"messages": []}, "no messages"),
    "message a text": ({"messages": ["hello"]}, "no list of objects"),
    "role a number": ({"messages": [{"role": 5, "content": "a"}]}, "message 1 has the keys role, content"),
    "number in content": ({"messages": [USER | {"content": [5]}]}, "message 1, part 1 is a int"),
    "image": ({"messages": [USER | {"content": [{"type": "image_url", "image_url": "u"}]}]}, "type, image_url"),
    "call of null": ({"messages": [ANSWER | {"tool_calls": [{"function": None}]}]}, "a tool call without a name"),
    "call a text": ({"messages": [ANSWER | {"tool_calls": "add"}]}, "a tool call without a name"),
    "empty texts": ({"prompt": "", "completion": ""}, "is empty"),
    "text and number": ({"prompt": "a", "completion": 5}, "a str as prompt and a int as completion"),
    "unlike pair": ({"prompt": "a", "chosen": "b", "rejected": [USER]}, "a str and a list"),
    "mixed kinds": ({"prompt": "a", "completion": "b"}, "holds texts, the lines before token ids"),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_rows(name: str, tmp_path: Path) -> None:
    row, expected = MEANINGS[name]
    rollouts = load_rollouts(write_rollouts(tmp_path / "rows.jsonl", [row]))
    assert [parts(rollout) for rollout in rollouts] == expected
    assert len({rollout.group for rollout in rollouts}) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, expected = REFUSED[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("[5, 6]\n\n" * ("mixed" in name) + json.dumps(row) + "\n")
    line = refusal(capsys, "inspect", file)
    assert f"{file}, line {3 if 'mixed' in name else 1}" in line and expected in line


def test_halves_of_characters_are_read(tmp_path: Path) -> None:
    rollouts = load_rollouts(write_rollouts(tmp_path / "half.jsonl", [{"prompt": "a \ud83d", "completion": "b"}]))
    (sequence,) = trajectory_sequences(rollouts, ByteEncoder())
    assert bytes(sequence.tokens.tolist()) == b"a ?b"
    (sequence,) = trajectory_sequences(rollouts, load_encoder(str(save_tokenizer(tmp_path, "a ? b"))))
    assert len(sequence.tokens) == 3
