"""What reaches a terminal: no control characters, one line for every failure, progress where it takes long."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.cli import inspect_command, main, terminal
from tests.cli.support import refusal, run_dta, save_model, write_rollouts


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

    monkeypatch.setattr(inspect_command, "run", run)
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
