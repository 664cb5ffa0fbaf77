"""The memory benchmark of diffusion updates runs, its two ways agree, and one of them grows. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.long
def test_memory(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "diffusion_memory.py"), "--smoke", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["samples"] for row in rows] == [1, 2, 4]
    first = rows[0]["saved_bytes"]
    for row in rows:
        assert row["saved_bytes"]["loop"] == pytest.approx(first["loop"], rel=0.05)
        assert row["saved_bytes"]["one_graph"] == pytest.approx(row["samples"] * first["one_graph"], rel=0.05)
        assert row["error"] < 1e-5
    assert "ms per sample, loop" in done.stdout


def test_learning_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("diffusion_learning")
    rewards = [0.2] * 2 + [0.5] * 16 + [0.9] * 2
    runs = [
        {"name": name, "seed": seed, "reward": rewards, "grad_norm": [1.0] * 20, "seconds": [0.25] * 20}
        for name in benchmark.OBJECTIVES
        for seed in (0, 1)
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.learning_table(runs).splitlines()]
    assert [line[0] for line in lines[2:]] == ["bgpo", "vrpo", "diffu-grpo"]
    assert lines[2][1:] == ["4", "0.200 +- 0.000", "0.900 +- 0.000", "0.510 +- 0.000", "0.25", "1.00"]


@pytest.mark.slow
def test_learning(tmp_path: Path) -> None:
    build = [sys.executable, str(BENCHMARKS.parent / "recipes" / "quickstart" / "diffusion.py"), "--steps", "20"]
    subprocess.run([*build, "--output", str(tmp_path / "built")], check=True, timeout=300)
    command = [
        sys.executable,
        str(BENCHMARKS / "diffusion_learning.py"),
        "--smoke",
        "--folder",
        str(tmp_path / "built"),
    ]
    plot, result = tmp_path / "curves.png", tmp_path / "result.json"
    done = subprocess.run(
        [*command, "--plot", str(plot), "--output", str(result)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.exists() and [len(run["reward"]) for run in json.loads(result.read_text())["runs"]] == [2, 2, 2]
