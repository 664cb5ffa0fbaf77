"""Files of rollouts, formats x defects: every one is read, or refused in one line that names file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.cli import inspect, json_rows, main, terminal
from dta_plugin.cli.encoding import ByteEncoder, load_encoder
from dta_plugin.cli.rollouts import Rollout, load_rollouts, trajectory_sequences
from dta_plugin.errors import InvalidInputError
from tests.cli.support import run_dta, save_config, save_model, save_tokenizer, write_rollouts

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ROWS = [{"prompt_ids": [5, 6], "completion_ids": [7]}, {"prompt_ids": [5, 6], "completion_ids": [8, 9]}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
BOM = "\ufeff"

ENCODED: dict[str, bytes] = {
    "utf8": LINES.encode(),
    "bom": LINES.encode("utf-8-sig"),
    "bom on every line": LINES.replace("{", BOM + "{").encode(),
    "utf16": LINES.encode("utf-16"),
    "utf16 big endian, no bom": LINES.encode("utf-16-be"),
    "utf32": LINES.encode("utf-32"),
    "gzip": gzip.compress(LINES.encode()),
    "gzip of utf16": gzip.compress(LINES.encode("utf-16")),
    "bzip2": bz2.compress(LINES.encode()),
    "xz": lzma.compress(LINES.encode()),
    "windows line ends, blank lines": ("\n \n" + LINES).replace("\n", "\r\n").encode(),
    "no line end": LINES.rstrip().encode(),
    "array": json.dumps(ROWS).encode(),
    "array over lines": json.dumps(ROWS, indent=1).encode(),
    "array, a row per line": ("[" + LINES.rstrip().replace("\n", ",\n") + "]").encode(),
    "objects over lines": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
}

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

DAMAGED: dict[str, tuple[bytes, str]] = {
    "truncated gzip": (gzip.compress(LINES.encode())[:-12], "cannot be decompressed"),
    "gzip with a wrong checksum": (gzip.compress(LINES.encode())[:-8] + b"12345678", "cannot be decompressed"),
    "not UTF-8": (LINES.encode() + b'{"prompt": "\xff"}\n', "line 3 is not UTF-8: byte 0xff"),
    "half a UTF-16 character": (LINES.encode("utf-16")[:-1], "is not utf-16 after line"),
    "truncated line": (LINES.encode()[:-9], "line 2 is not JSON"),
    "truncated array": (json.dumps(ROWS, indent=1).encode()[:-3], "is not JSON"),
    "array with an error": (b'[\n{"tokens": [5]},\n{"tokens": oops}\n]', "line 3 is not JSON"),
    "after an array": (b"[\n[5]\n]\n[6]\n", "goes on after the array's end"),
    "nested": (b'{"tokens": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n", "line 1 is nested too deeply"),
    "nested array": (b"[\n" + b"[" * 50_000 + b"]" * 50_000 + b"\n]", "line 2, element 1 is nested too deeply"),
    "a number of 5,000 digits": (b"[" + b"1" * 5000 + b"]\n", "line 1 cannot be read"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(20), "a zip archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd -d"),
    "pickle": (b"\x80\x04\x95" + bytes(20), "a pickle"),
    "numpy": (b"\x93NUMPY" + bytes(20), "a NumPy file"),
    "zeros": (bytes(64), "is not JSON"),
    "csv": (b"prompt,completion\na,b\n", "line 1 is not JSON"),
    "escape in a key": (b'{"\\u001b[31m": 1}\n', r"has the keys \x1b[31m."),
    "nothing": (b"", "holds no rollouts"),
    "Parquet": (b"PAR1\x15\x04\x15\x10PAR1", "as a Parquet file"),
    "Arrow": (b"ARROW1\x00\x00" + bytes(20), "as a Arrow file"),
}


def parts(rollout: Rollout) -> tuple[Any, Any]:
    """(prompt, completion) of a rollout, as MEANINGS writes them."""
    if rollout.text is not None:
        return rollout.text
    cut = rollout.prompt_length
    if rollout.tokens is not None:
        return rollout.tokens[:cut].tolist(), rollout.tokens[cut:].tolist()
    texts = [f"{message['role']}: {message['content']}" for message in rollout.messages or []]
    return " ".join(texts[:cut]), " ".join(texts[cut:])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line in which `dta` refuses its input."""
    code, out, err = run_dta(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.isascii() and err[:-1].isprintable()
    return err


@pytest.mark.parametrize("name", ENCODED)
def test_files_are_known_by_what_they_hold(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rollouts"
    file.write_bytes(ENCODED[name])
    assert [parts(rollout) for rollout in load_rollouts(file)] == [([5, 6], [7]), ([5, 6], [8, 9])]


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


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = DAMAGED[name]
    if name in ("Parquet", "Arrow"):
        pytest.importorskip("pyarrow")
    file = tmp_path / "damaged.jsonl"
    file.write_bytes(content)
    line = refusal(capsys, "inspect", file)
    assert str(file) in line and expected in line


def test_lists_in_an_array_are_rollouts_in_json_and_a_batch_in_jsonl(tmp_path: Path) -> None:
    array, line = tmp_path / "ids.json", tmp_path / "ids.jsonl"
    for file in (array, line):
        file.write_text("[[5, 6], [5, 7]]")
    assert [parts(rollout) for rollout in load_rollouts(array)] == [([], [5, 6]), ([], [5, 7])]
    with pytest.raises(InvalidInputError, match="a batch of rows"):
        load_rollouts(line)


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_arrow(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow files need pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def write_saved(path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="saves a data set")
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def write_splits(path: Path) -> None:
    write_saved(path / "train")
    (path / "dataset_dict.json").write_text('{"splits": ["train"]}')


def write_steps(path: Path) -> None:
    path.mkdir()
    for step, row in zip((2, 10), ROWS, strict=True):
        write_rollouts(path / f"{step}.jsonl", [row])
    (path / "README.md").write_text("not rollouts")


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_saved, write_splits, write_steps])
def test_tables_and_folders(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "rollouts")
    expected = [([5, 6], [7]), ([5, 6], [8, 9])]
    assert [parts(rollout) for rollout in load_rollouts(tmp_path / "rollouts")] == expected


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    assert "found none" in refusal(capsys, "inspect", folder)
    for split in ("test", "train"):
        (folder / split).mkdir()
    assert "the folders test, train; name one" in refusal(capsys, "inspect", folder)


def test_a_row_of_a_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"input_ids": [[5]] * 70 + [None]})
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    assert f"{file}, row 71 has the keys input_ids" in refusal(capsys, "inspect", file)
    assert run_dta(capsys, "inspect", file, "--limit", "70")[0] == 0


def test_tables_without_pyarrow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(capsys, "inspect", tmp_path / "rows.parquet")


def test_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.gz"
    file.write_bytes(gzip.compress(LINES.encode() + b"oops\n"))
    for limit, code, expected in (
        ("2", 0, "standard input: 2 rollouts"),
        ("3", 2, "standard input, line 3 is not JSON"),
    ):
        with file.open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            found = run_dta(capsys, "inspect", "-", "--limit", limit)
        assert found[0] == code and expected in found[1] + found[2]


@pytest.mark.parametrize("content", [LINES + "oops\n", json.dumps(ROWS)[:-1] + ', "oops'])
def test_limit_reads_no_more_than_it_must(content: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content.replace("}, {", "},\n{"))
    assert len(load_rollouts(file, limit=2)) == 2
    with pytest.raises(InvalidInputError, match="is not JSON"):
        load_rollouts(file)


def test_verify_reads_until_its_first_group_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES + "oops\n")
    options = ("verify", "--model", save_config(tmp_path / "model"), file)
    assert run_dta(capsys, *options, "--limit", "2")[0] == 0
    assert "line 3 is not JSON" in refusal(capsys, *options, "--limit", "3")


@pytest.mark.parametrize("content", ['{"prompt": "aaaa', '["aaaa', '[\n"aaaa'])
def test_a_value_has_a_largest_size(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_VALUE", 1000)
    monkeypatch.setattr(json_rows, "_CHUNK", 100)
    file = tmp_path / "long.jsonl"
    file.write_text(content + "a" * 5000)
    assert f"{file}, line {content.count(chr(10)) + 1}" in (line := refusal(capsys, "inspect", file))
    assert "is longer than" in line


def test_halves_of_characters_are_read(tmp_path: Path) -> None:
    rollouts = load_rollouts(write_rollouts(tmp_path / "half.jsonl", [{"prompt": "a \ud83d", "completion": "b"}]))
    (sequence,) = trajectory_sequences(rollouts, ByteEncoder())
    assert bytes(sequence.tokens.tolist()) == b"a ?b"
    (sequence,) = trajectory_sequences(rollouts, load_encoder(str(save_tokenizer(tmp_path, "a ? b"))))
    assert len(sequence.tokens) == 3


def test_control_characters_stay_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"uid": "\x1b[31m\x9b\u202e", "prompt": "\x1b]0;x\x07\x7f" * 9, "completion": f"\x9b{i}"} for i in "ab"]
    file = write_rollouts(tmp_path / "rows.jsonl", rows)
    code, out, _ = run_dta(capsys, "inspect", file, "--svg", tmp_path / "x.svg")
    assert code == 0 and all(line.isprintable() for line in out.splitlines())
    assert all(line.isprintable() for line in (tmp_path / "x.svg").read_text().splitlines())
    _, out, _ = run_dta(capsys, "inspect", file, "--json")
    assert json.loads(out)["forks"][0]["group"] == rows[0]["uid"] and "\x7f" not in out


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (KeyError("x"), 2, "KeyError: 'x' (dta_plugin/cli/__init__.py, line"),
        (MemoryError(), 2, "MemoryError: MemoryError"),
        (KeyboardInterrupt(), 130, "dta inspect: interrupted\n"),
        (BrokenPipeError(), 0, ""),
        (OSError(28, "No space left on device"), 2, "dta: [Errno 28] No space left on device"),
    ],
)
def test_the_last_resort(
    error: BaseException,
    code: int,
    expected: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(inspect, "run", run)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main(["inspect", "x"]) == code
    captured = capfd.readouterr()
    assert captured.out == "" and expected in captured.err and captured.err.count("\n") == bool(expected)


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PATIENCE", 0.0)
    assert list(terminal.progress(range(3), "rows")) == [0, 1, 2]
    with terminal.waiting("loading"):
        pass
    assert capsys.readouterr().err == ""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(terminal.progress(range(3), "rows")) == [0, 1, 2]
    with terminal.waiting("loading"):
        while "loading ..\n" not in screen.getvalue():
            time.sleep(0.001)
    assert "rows" in screen.getvalue()


@pytest.mark.parametrize(
    "defect, expected",
    [
        ("cut", "cannot be loaded as a causal LM"),
        ("zeros", "cannot be loaded as a causal LM"),
        ("pointer", "git lfs pull"),
        ("sizes", "cannot be loaded as a causal LM"),
        ("layers", "lacks"),
        ("heads", "num_key_value_heads=3"),
        ("hidden", "hidden"),
    ],
)
def test_damaged_models(defect: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path, "llama")
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    content = weights.read_bytes()
    if defect in ("cut", "zeros", "pointer"):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        weights.write_bytes({"cut": content[: len(content) // 2], "zeros": bytes(100), "pointer": pointer}[defect])
    changes: dict[str, dict[str, Any]] = {
        "sizes": {"intermediate_size": config["intermediate_size"] * 2},
        "layers": {"num_hidden_layers": config["num_hidden_layers"] + 1, "layer_types": None},
        "heads": {"num_attention_heads": 4, "num_key_value_heads": 3},
        "hidden": {"hidden_size": config["hidden_size"] + 1, "head_dim": None},
    }
    (folder / "config.json").write_text(json.dumps(config | changes.get(defect, {})))
    assert expected in refusal(capsys, "verify", "--model", folder, "--max-tokens", "16")
