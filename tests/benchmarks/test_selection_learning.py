"""The learning benchmark trains with every selection, and its table and plot show the runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
NAMES = ["all tokens", "rpc 50 %", "urs 50 %"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    """On a model that is hardly trained, whose rewards may all be 0."""
    pytest.importorskip("trl")
    python("recipes/quickstart/build.py", "--output", str(tmp_path), "--steps", "10", "--prompts", "32")
    files = ["--output", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plots" / "result.png")]
    done = python("benchmarks/selection_learning.py", "--smoke", "--folder", str(tmp_path), "--workers", "1", *files)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= {"benchmark", "clock", "commit", "machine", "selections", "versions"}
    assert [run["name"] for run in result["runs"]] == NAMES
    for run in result["runs"]:
        series = ("reward", "grad_norm", "tree_tokens", "kept_fraction", "seconds", "saved_bytes")
        assert [len(run[name]) for name in series] == [2] * len(series)
        assert run["name"] in done.stdout
    assert len({run["reward"][0] for run in result["runs"]}) == 1, "the first step samples from the same model"
    assert (tmp_path / "plots" / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_without_a_model_it_says_how_to_make_one(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "selection_learning.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "build.py --output" in done.stderr


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    report, curves = map(importlib.import_module, ("selection_learning_report", "curves"))
    runs = [
        {
            "name": name,
            "seed": seed,
            "reward": [0.2] * 2 + [0.5] * 16 + [0.8 + 0.1 * seed] * 2,
            "grad_norm": [1.0] * 20,
            "tree_tokens": [tokens] * 20,
            "kept_fraction": [kept] * 19 + [None],
            "seconds": [seconds] * 20,
            "saved_bytes": [2_000_000] * 20,
        }
        for name, tokens, kept, seconds in (("all tokens", 100, None, 2.0), ("rpc 50 %", 60, 0.5, 1.5))
        for seed in (0, 1)
    ]
    whole, half = (line.split("|")[1:-1] for line in report.learning_table(runs).splitlines()[2:])
    assert [cell.strip() for cell in whole][1:4] == ["0.200 +- 0.000", "0.850 +- 0.071", "0.505 +- 0.007"]
    assert [cell.strip() for cell in whole][4:] == ["100%", "100", "2.000", "1.00x", "2.0", "1.00"]
    assert [cell.strip() for cell in half][4:8] == ["50%", "60", "1.500", "0.75x"]
    assert curves.smoothed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
