"""Files and folders that hold no rollouts: one line that says what was given, what is read and what to do."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.support import load_rollouts, parts, refusal, save_config, save_model, write_rollouts

READ = "JSONL, JSON, Parquet or Arrow"
DOCTOR = "dta doctor --model"

# Name: content, what it is, what to do.
KINDS: dict[str, tuple[bytes, str, str]] = {
    "empty.jsonl": (b"", "is empty (0 bytes)", READ),
    "pytorch_model.bin": (b"PK\x03\x04" + bytes(30), "a file of torch.save", DOCTOR),
    "rollouts.pt": (b"PK\x03\x04" + bytes(30) + b"archive/data.pkl", "a file of torch.save", "torch.load"),
    "no_suffix": (b"PK\x03\x04" + bytes(30) + b"archive/data.pkl", "a file of torch.save", DOCTOR),
    "old.pt": (b"\x80\x02\x8a\nl\xfc\x9cF", "a pickle", READ),
    "model.gguf": (b"GGUF" + bytes(40), "a GGUF file, the weights of a model", DOCTOR),
    "x.zip": (b"PK\x03\x04" + bytes(30), "a zip archive", "run: unzip"),
    "x.tar": (b"rows.jsonl" + bytes(247) + b"ustar" + bytes(250), "a tar archive", "run: tar -xf"),
    "x.zst": (b"\x28\xb5\x2f\xfd" + bytes(30), "compressed by zstd", "zstd -d"),
    "x.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture", READ),
    "x.jpg": (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG picture", READ),
    "x.pdf": (b"%PDF-1.7\n", "a PDF file", READ),
    "x.sqlite": (b"SQLite format 3\0" + bytes(80), "an SQLite database", READ),
    "login.jsonl": (b"<!DOCTYPE html>\n<html>", "an HTML page", READ),
    "rows.yaml": (b"- prompt: a\n", "a YAML file", READ),
    "repr.txt": (b"{'prompt': 'a'}\n", "not JSON", "Python's repr: write rows by json.dumps"),
    "latin1.jsonl": ('{"prompt": "\u00e9"}'.encode("latin-1"), "is not UTF-8", "iconv"),
}


@pytest.mark.parametrize("name", KINDS)
def test_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, what, remedy = KINDS[name]
    (tmp_path / name).write_bytes(content)
    line = refusal(capsys, "inspect", tmp_path / name)
    assert str(tmp_path / name) in line and what in line and remedy in line


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    line = refusal(capsys, "inspect", folder)
    assert (
        f"{folder} is the folder of a model (config.json). Expected rollouts" in line and f"{DOCTOR} {folder}" in line
    )
    line = refusal(capsys, "inspect", folder / "model.safetensors")
    assert "a safetensors file, the weights of a model" in line and DOCTOR in line
    assert "the folder of a model" in refusal(capsys, "inspect", save_config(tmp_path / "config"))


def test_a_run_with_a_config_of_its_own_is_read(tmp_path: Path) -> None:
    """A config.json that is no model's does not hide what stands beside it; UTF-32 is no safetensors file."""
    (tmp_path / "rows.jsonl").write_bytes(b'{"tokens": [5]}\n')
    (tmp_path / "config.json").write_text('{"tokens": [6]}')
    assert len(load_rollouts(tmp_path)) == 2
    (tmp_path / "wide.jsonl").write_bytes('{"tokens": [5]}'.encode("utf-32-le"))
    assert [parts(rollout) for rollout in load_rollouts(tmp_path / "wide.jsonl")] == [([], [5])]


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), ("\t", "tsv")])
def test_the_command_for_a_table_works(
    separator: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"two words.{suffix}"
    file.write_text(separator.join(["prompt", "completion", "reward"]) + "\n" + separator.join(["q", '"a\nb"', "0.5"]))
    line = refusal(capsys, "inspect", file)
    command = line.partition("Run: ")[2].partition(" > rollouts.jsonl")[0]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    made = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert json.loads(made) == {"prompt": "q", "completion": "a\nb", "reward": "0.5"}
    (tmp_path / "rollouts.jsonl").write_text(made)
    assert [parts(rollout) for rollout in load_rollouts(tmp_path / "rollouts.jsonl")] == [("q", "a\nb")]


def test_rows_one_level_too_deep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row, hint in (
        ({"data": [{"messages": chat}]}, "What stands under 'data' can be read: jq -c '.data[]' FILE"),
        ({"sample": {"tokens": [5]}}, "What stands under 'sample' can be read: jq -c '.sample' FILE"),
        ({"trajectory": chat}, "'trajectory' holds a chat: rename it to messages."),
        ({"prompt": "a", "answer": "4"}, "There is a prompt here, but no answer under these names"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "2 texts as prompt: columns. Expected one rollout a row"),
    ):
        assert hint in refusal(capsys, "inspect", write_rollouts(tmp_path / "rows.jsonl", [row]))
    line = refusal(capsys, "inspect", write_rollouts(tmp_path / "rows.jsonl", [{"unknown": 1}]))
    assert line.endswith("or prompt and completion.\n")
