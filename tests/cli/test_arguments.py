"""Mistyped commands and options: one line that says what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from dta_plugin.cli import main
from dta_plugin.errors import did_you_mean
from tests.cli.support import refusal, write_rollouts


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("inspct rows.jsonl", "'inspct' is no command. Did you mean inspect? Expected one of: inspect, doctor,"),
        ("inspect rows.jsonl --htlm out.html", "dta inspect: there is no option --htlm. Did you mean --html?"),
        ("inspect --htlm=out.html", "Did you mean --html?"),  # not that FILE is missing
        ("inspect --tokeniser rows.jsonl", "Did you mean --tokenizer?"),
        ("verify --modle x", "Did you mean --model?"),
        ("--vesion", "Did you mean --version?"),
        ("inspect a.jsonl b.jsonl", "got 'b.jsonl', which is more than it takes. Expected one file, or a folder"),
        ("inspect", "arguments are required: FILE. See: dta inspect --help"),
    ],
)
def test_mistyped(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in usage_error(capsys, *arguments.split())


def test_nothing_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["zzz"], ["inspect", "rows.jsonl", "--zzz"]):
        assert "Did you mean" not in usage_error(capsys, *arguments)
    assert did_you_mean("zzz", ["html"]) == "" and did_you_mean("htlm", ["html"], "--") == " Did you mean --html?"


def test_a_file_as_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "rows.jsonl", [[5, 6]])
    assert f"To look at what it holds: dta inspect {file}." in usage_error(capsys, str(file))


def test_abbreviations_and_what_follows_two_dashes_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rollouts(tmp_path / "--htlm", [[5, 6]])
    assert main(["inspect", "--lim", "1", "--", "--htlm"]) == 0
    assert "--htlm: 1 rollout in 1 group" in capsys.readouterr().out


def test_names_within_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "rows.jsonl", [{"uid": "airline-17", "tokens": [5]}])
    assert "Did you mean airline-17?" in refusal(capsys, "inspect", file, "--group", "airlin-17")
    assert "Did you mean layers?" in refusal(capsys, "inspect", file, "--geometry", "layer=3")
