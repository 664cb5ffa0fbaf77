"""Parquet and Arrow files, columns of every kind, and whole or not: read, or refused in one line with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import refusal, run_dta

USER, ANSWER = {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}


def table_file(path: Path, columns: dict[str, Any]) -> None:
    """Parquet or Arrow, by the name."""
    pyarrow = pytest.importorskip("pyarrow")
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


ROWS = {"input_ids": [[5, 6], [5, 7]]}
# Columns, and words of the refusal; None: it is read.
TABLES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no rows": ({"input_ids": []}, "holds no rollouts"),
    "null column": (ROWS | {"messages": [None, None]}, None),
    "floats": ({"input_ids": [[5.0, 6.0]]}, "row 1 has token ids that are float values"),
    "null ids": ({"input_ids": [[5], [5, None]]}, "row 2 has token ids that are NoneType, int values"),
    "2-D": ({"input_ids": [[[5], [6]]]}, "row 1 has token ids that are a batch of rows"),
    "bytes": ({"prompt": [b"\xff"], "completion": ["a"]}, "row 1 has a bytes as prompt"),
    "chat": ({"messages": [[USER | {"tool_calls": None}, ANSWER | {"tool_calls": [{"name": "f"}]}]]}, None),
    "chat as text": ({"messages": [json.dumps([USER])]}, "row 1 has messages that are no list of objects"),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, words = TABLES[name]
    file = tmp_path / f"rows{suffix}"
    table_file(file, columns)
    if words is None:
        assert run_dta(capsys, "inspect", file)[::2] == (0, "")
    else:
        line = refusal(capsys, "inspect", file)
        assert str(file) in line and words in line


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_dates_that_python_cannot_hold(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    far = {
        "day": pyarrow.array([2**30, 0], pyarrow.date32()),
        "at": pyarrow.array([10**17, 1], pyarrow.timestamp("ms")),
    }
    table_file(tmp_path / f"rows{suffix}", ROWS | far)
    assert run_dta(capsys, "inspect", tmp_path / f"rows{suffix}")[::2] == (0, "")


def test_damaged_tables_end_no_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Offsets that lead out of a column make pyarrow read memory that is not its own."""
    table_file(tmp_path / "rows.arrow", {"input_ids": [[5, 6], [5, 7]] * 100})
    content = (tmp_path / "rows.arrow").read_bytes()
    at = content.index(bytes([2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0]))  # where the lists end
    (tmp_path / "rows.arrow").write_bytes(content[:at] + b"\xff\xff\xff\x7f" * 40 + content[at + 160 :])
    assert "rows.arrow cannot be read as Arrow after row 0" in refusal(capsys, "inspect", tmp_path / "rows.arrow")
    (tmp_path / "rows.arrow").write_bytes(content[: len(content) // 2])
    assert "rows.arrow cannot be read as Arrow after row 0" in refusal(capsys, "inspect", tmp_path / "rows.arrow")


def test_a_saved_data_set_and_what_was_computed_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"length": len(row["input_ids"])})
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 1
    code, out, _ = run_dta(capsys, "inspect", tmp_path / "saved")
    assert code == 0 and "saved: 2 rollouts" in out
