"""Files as they turn up, formats x defects: every one is read, or refused in one line that names the file and the line.

What is read is also merged, drawn and printed, as text and as JSON: a file that loads may still be one that breaks what
comes after. Parquet and Arrow: test_tables.py.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import refusal, run_dta, save_config

USER, ANSWER = {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}
CHAT = {"messages": [USER, ANSWER]}
IDS = {"prompt_ids": [5, 6], "completion_ids": [7]}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def nested(depth: int) -> bytes:
    """A tool call whose arguments are this many lists in each other."""
    arguments = b"[" * depth + b"]" * depth
    call = b'{"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": ' + arguments + b"}]}"
    return b'{"messages": [{"role": "user", "content": "a"}, ' + call + b"]}\n"


READ: dict[str, bytes] = {
    # What the first users of `dta inspect` brought.
    "bom.jsonl": b"\xef\xbb\xbf" + lines(CHAT, {"messages": [USER, ANSWER | {"content": "w8 w11"}]}),
    "json_array.json": json.dumps([CHAT, CHAT], indent=1).encode(),
    "lone_surrogate.jsonl": lines({"messages": [USER | {"content": "smile \ud83d"}, ANSWER]}),
    "mask_null.jsonl": lines({"input_ids": [5, 6, 7], "attention_mask": None}),
    "null_messages_and_prompt.jsonl": lines({"messages": None, "prompt": "w5 w6", "completion": "w7"}),
    "preference.jsonl": lines({"prompt": "w5", "chosen": "w6", "rejected": "w7"}),
    "sharegpt.jsonl": lines({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    "tool_calls_dict.jsonl": lines({"messages": [USER, ANSWER | {"tool_calls": {"name": "add", "arguments": {}}}]}),
    "trl_completions.jsonl": lines({"step": 1, "prompt": "w5", "completion": "w7", "reward": 0.5, "advantage": None}),
    # Encodings and containers.
    "utf16_chat.json": json.dumps([CHAT], indent=1).encode("utf-16"),
    "mac_line_ends.jsonl": lines(CHAT, CHAT).replace(b"\n", b"\r"),
    "line_separators.jsonl": json.dumps({"prompt": "a\u2028b\x85", "completion": "c\x0b"}, ensure_ascii=False).encode(),
    "two_members.jsonl.gz": gzip.compress(lines(IDS)) + gzip.compress(lines(IDS)),
    "twice.gz.gz": gzip.compress(gzip.compress(lines(IDS))),
    "chat.bz2": bz2.compress(lines(CHAT)),
    "one_chat_over_lines.json": json.dumps([USER, ANSWER], indent=1).encode(),
    "ids_over_lines.json": json.dumps([5, 6, 7], indent=1).encode(),
    "no_suffix": lines(IDS),
    "trailing_comma.json": b'[\n{"tokens": [5]},\n]\n',
    "half_a_pair.utf16": "\n".encode("utf-16")
    + '{"prompt": "'.encode("utf-16-le")
    + b"\x00\xd8"
    + ('", "completion": ""}\n'.encode("utf-16-le")),
    # Rows.
    "duplicate_keys.jsonl": b'{"tokens": "x", "tokens": [5, 6], "tokens": [5, 7]}\n',
    "control_characters.jsonl": lines(
        {"uid": "\u001b[2J\x00\x7f", "prompt": "\x00\u001b]0;t\x07", "completion": "\u202e"},
        {"uid": "\u001b[2J\x00\x7f", "prompt": "\x00\u001b]0;t\x07", "completion": "\ud800"},
    ),
    "odd_groups.jsonl": lines(IDS | {"uid": {"a": [1]}}, IDS | {"uid": float("nan")}, IDS | {"uid": True}),
    "surrogate_group.jsonl": lines(IDS | {"group": "\ud83d"}, IDS | {"group": "\udc00"}),
    "nan_reward.jsonl": lines(IDS | {"reward": float("nan"), "logprobs": [float("inf")]}),
    "largest_id.jsonl": lines({"tokens": [0, 2**32 - 1]}),
    "one_token.jsonl": lines({"tokens": [5]}, {"tokens": [5]}),
    "prompt_only.jsonl": lines({"prompt": [USER], "completion": []}, {"prompt": [USER], "completion": None} | CHAT),
    "ids_of_prompt_only.jsonl": lines({"prompt_ids": [5, 6], "completion_ids": []}, IDS),
    "completions.jsonl": lines({"prompt": "a", "completions": ["b", None, "", "b"]}),
    "verl_dump.jsonl": lines({"input": "a", "output": "b", "gts": None, "score": 1.0, "step": 1}),
    "vllm.jsonl": lines({"prompt_token_ids": [5], "token_ids": [6], "prompt": "a"}),
    "bool_mask.jsonl": lines({"input_ids": [5, 6], "attention_mask": [False, True], "labels": [-100, 6]}),
    "empty_contents.jsonl": lines({"messages": [{"role": "user", "content": ""}, {"role": "assistant"}]}),
    "nested_500.jsonl": nested(500),
    "long_line.jsonl": lines({"tokens": [7] * 300_000}, {"tokens": [7] * 300_000 + [8]}),
    "many_keys.jsonl": lines(IDS | {f"key{i}": i for i in range(5000)}),
}

# name: content, place, words of the refusal.
REFUSED: dict[str, tuple[bytes, str, str]] = {
    # What the first users of `dta inspect` brought.
    "content_parts_odd.jsonl": (lines({"messages": [USER | {"content": [None, 5]}]}), "line 1", "part 2 is a int"),
    "mask_wrong_len.jsonl": (lines({"input_ids": [5, 6, 7], "attention_mask": [1, 1]}), "line 1", "2 values as atten"),
    "ragged_ids.jsonl": (lines({"input_ids": [[5, 6], [7]]}), "line 1", "a batch of rows"),
    "rollouts.parquet": (b"PAR1\x15\x04\x15\x10PAR1", "after row 0", "Is it complete?"),
    "tool_calls_null_function.jsonl": (
        lines({"messages": [USER, ANSWER | {"content": None, "tool_calls": [{"id": "c1", "function": None}]}]}),
        "line 1, message 2",
        "a tool call without a name",
    ),
    # Encodings and containers.
    "latin1.jsonl": (lines(CHAT) + '{"prompt": "é"}\n'.encode("latin-1"), "line 2", "not UTF-8: byte 0xe9"),
    "cut_late.jsonl.gz": (gzip.compress(lines(*[IDS] * 3000), 0)[:-70], "what follows", "cannot be decompressed"),
    "trailing.gz": (gzip.compress(lines(IDS)) + b"junk", "trailing.gz", "cannot be decompressed"),
    "cut_header.gz": (gzip.compress(lines(IDS))[:7], "cut_header.gz", "cannot be decompressed"),
    "damaged.bz2": (bz2.compress(lines(*[IDS] * 9))[:-9], "damaged.bz2", "Is it complete?"),
    "garbled.bz2": (b"BZh91AY&SY" + bytes(60), "garbled.bz2", "cannot be"),
    "garbled.xz": (lzma.compress(lines(*[IDS] * 9))[:-40] + bytes(40), "garbled.xz", "cannot be decompressed"),
    "empty.gz": (gzip.compress(b""), "empty.gz", "holds no rollouts"),
    "blank.jsonl": (b"\n \n\t\r\n\xef\xbb\xbf\n", "blank.jsonl", "holds no rollouts"),
    "brackets.json": (b"[]\n", "line 1", "is empty"),
    "brackets_over_lines.json": (b"[\n\n]\n", "brackets_over_lines.json", "holds no rollouts"),
    "sqlite.db": (b"SQLite format 3\0" + bytes(84), "sqlite.db", "an SQLite database"),
    "image.png": (b"\x89PNG\r\n\x1a\n" + bytes(32), "image.png", "a PNG picture"),
    "model.safetensors": (
        b'@\0\0\0\0\0\0\0{"__metadata__":{}}' + bytes(50),
        "model.safetensors",
        "the weights of a model",
    ),
    "archive.tar": (b"rows.jsonl" + bytes(90) + b"0000644" + bytes(405), "line 1", "not JSON"),
    "page.html": (b"<!doctype html>\n<html>404</html>\n", "page.html", "an HTML page"),
    "python.txt": (b"{'prompt': 'a', 'completion': 'b'}\n", "line 1", "not JSON"),
    "two_on_a_line.jsonl": (lines(IDS)[:-1] + lines(IDS), "line 1", "Extra data"),
    "nul_bytes.jsonl": (lines(IDS) + b'{"tokens": [5,\x00 6]}\n', "line 2", "not JSON"),
    "nul_in_text.jsonl": (b'{"prompt": "a\x00", "completion": "b"}\n', "line 1", "control character"),
    # Rows.
    "nested_10000.jsonl": (lines(IDS) + nested(10_000), "line 2", "nested too deeply"),
    "nan_ids.jsonl": (b'{"tokens": [5, NaN]}\n', "line 1", "float, int values"),
    "infinite_ids.jsonl": (b'{"tokens": [1e999]}\n', "line 1", "float values"),
    "negative_ids.jsonl": (lines({"input_ids": [5, -100]}), "line 1", "token ids from -100 to 5"),
    "huge_number.jsonl": (b'{"tokens": [' + b"9" * 5000 + b"]}\n", "line 1", "cannot be read"),
    "ids_as_object.jsonl": (lines({"tokens": {"0": 5}}), "line 1", "dict values"),
    "bool_ids.jsonl": (lines({"prompt_ids": [5], "completion_ids": [True]}), "line 1", "bool values"),
    "empty_row.jsonl": (lines(IDS, {}), "line 2", "empty object"),
    "empty_ids.jsonl": (lines(IDS, {"prompt_ids": [], "completion_ids": []}), "line 2", "is empty"),
    "no_completions.jsonl": (lines({"prompt": "a", "completions": []}), "line 1", "a str as prompt and a list"),
    "null_completions.jsonl": (lines({"prompt": "a", "completions": [None]}), "line 1", "a str as prompt"),
    "mixed_completions.jsonl": (lines({"prompt": "a", "completions": ["b", 5]}), "line 1", "a int as completion"),
    "scalars.jsonl": (lines(IDS, 5), "line 2", "is a int"),
    "strings.jsonl": (lines("w5 w6"), "line 1", "is a str"),
    "list_of_texts.jsonl": (lines(["a", "b"]), "line 1", "str values"),
    "mixed_array.json": (json.dumps([IDS, 5]).encode(), "line 1, element 2", "is a int"),
    "chats_and_ids.jsonl": (lines(CHAT, CHAT, IDS), "line 3", "holds token ids, the lines before texts"),
    "group_missing.jsonl": (lines(IDS | {"uid": 1}, IDS), "line 2", "'uid', the key of its group"),
    "role_a_surrogate.jsonl": (lines({"messages": [{"\ud83d": "a"}]}), "line 1", r"keys \ud83d"),
    "thousand_keys.jsonl": (lines({f"key{i}": i for i in range(100_000)}), "line 1", "Expected token ids"),
    "text_of_a_key.jsonl": (lines({"x" * 10**6: 1}), "line 1", "Expected token ids"),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(READ[name])
    code, out, err = run_dta(capsys, "inspect", tmp_path / name, "--svg", tmp_path / "x.svg")
    assert (code, err) == (0, "") and all(line.isprintable() for line in out.splitlines())
    code, out, err = run_dta(capsys, "inspect", tmp_path / name, "--json")
    assert (code, err) == (0, "") and json.loads(out)["rollouts"] > 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, place, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    line = refusal(capsys, "inspect", tmp_path / name)
    assert name in line and place in line and words in line and len(line) < 2000
    assert "not foreseen" not in line


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_one_line(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes exchanged, lost and doubled anywhere."""
    draw, file = random.Random(seed), tmp_path / "rows"
    whole = [READ["bom.jsonl"], READ["json_array.json"], READ["utf16_chat.json"], gzip.compress(lines(*[IDS] * 20))]
    for content in whole * 5:
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 2, 8])):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        file.write_bytes(damaged)
        code, _, err = run_dta(capsys, "inspect", file)
        assert (code, err) == (0, "") or (code == 2 and err.count("\n") == 1 and str(file) in err), bytes(damaged)
        assert "not foreseen" not in err, bytes(damaged)


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps in order, names in capitals; empty files are passed over, a damaged one is named."""
    for name, content in {"2.JSONL": lines(IDS), "10.jsonl": lines(IDS, 5), "9.jsonl": b"", "x.txt": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / '10.jsonl'}, line 2 is a int" in refusal(capsys, "inspect", tmp_path)
    code, out, _ = run_dta(capsys, "inspect", tmp_path, "--limit", "2")
    assert code == 0 and "2 rollouts" in out


def test_names_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (tmp_path / "none.jsonl", tmp_path / "loop", "x" * 300, tmp_path / "a\x1b\nb\udcff.jsonl"):
        line = refusal(capsys, "inspect", name)
        assert "cannot be read: " in line and "not foreseen" not in line
    assert "holds no rollouts" in refusal(capsys, "inspect", os.devnull)


def test_a_pipe() -> None:
    command = [sys.executable, "-m", "dta_plugin.cli", "inspect", "-"]
    done = subprocess.run(command, input=gzip.compress(lines(*[IDS] * 3000), 0)[:-9], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"dta inspect: standard input, line ") and b"what follows cannot be" in done.stderr


def test_standard_input_that_is_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed. Expected rollouts" in refusal(capsys, "inspect", "-")


def test_verify_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", save_config(tmp_path / "model", "llama"), "--max-tokens", "32")
    for name in ("one_token.jsonl", "prompt_only.jsonl", "half_a_pair.utf16", "twice.gz.gz"):
        (tmp_path / name).write_bytes(READ[name])
        code, out, err = run_dta(capsys, "verify", tmp_path / name, *options)
        assert (code, err) == (0, "") and "PASS" in out
    for name in ("nested_10000.jsonl", "trailing.gz", "empty_ids.jsonl"):
        content, place, words = REFUSED[name]
        (tmp_path / name).write_bytes(content)
        line = refusal(capsys, "verify", tmp_path / name, *options)
        assert name in line and place in line and words in line
