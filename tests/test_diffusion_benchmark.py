"""The memory benchmark of diffusion updates runs, its two ways agree, and one of them grows. No timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
