"""Files of rollouts, formats x defects: every one is read, or refused in one line that names file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dta_plugin.cli import json_rows
from dta_plugin.errors import InvalidInputError
from tests.cli.support import load_rollouts, parts, refusal, run_dta, save_config, write_rollouts

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

DAMAGED: dict[str, tuple[bytes, str]] = {
    "truncated gzip": (gzip.compress(LINES.encode())[:-12], "cannot be decompressed"),
    "gzip with a wrong checksum": (gzip.compress(LINES.encode())[:-8] + b"12345678", "cannot be decompressed"),
    "not UTF-8": (LINES.encode() + b'{"prompt": "\xff"}\n', "line 3 is not UTF-8: byte 0xff"),
    "half a UTF-16 character": (LINES.encode("utf-16")[:-1], "is not utf-16 from line 2 on: truncated data"),
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
    "Parquet": (b"PAR1\x15\x04\x15\x10PAR1", "as Parquet after row 0"),
    "Arrow": (b"ARROW1\x00\x00" + bytes(20), "as Arrow after row 0"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_files_are_known_by_what_they_hold(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rollouts"
    file.write_bytes(ENCODED[name])
    assert [parts(rollout) for rollout in load_rollouts(file)] == [([5, 6], [7]), ([5, 6], [8, 9])]


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
