"""The calibration benchmark runs, and its checks see a promise that is broken. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dta_plugin import PrefixTree

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    files = ["--output", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plots" / "result.png")]
    command = [sys.executable, str(BENCHMARKS / "calibrated.py"), "--smoke", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= {"benchmark", "clock", "commit", "machine", "model", "versions"}
    assert len(result["predicted"]) == 5 and len(result["gated"]) == 5 and len(result["checks"]) == 3
    for row in result["predicted"]:
        assert row["tree"]["measured"] > 0 and row["dense"]["predicted"] > 0
    assert {row["ran"] for row in result["gated"]} <= {"tree", "dense"}
    assert (tmp_path / "plots" / "result.png").read_bytes().startswith(b"\x89PNG")


def test_graded_batches_go_from_no_sharing_to_a_star_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    workloads = importlib.import_module("calibrated_workloads")
    cases = list(workloads.graded(8192))
    assert len(cases) == 40 and len({case.name for case in cases}) == 40
    ratios = [PrefixTree.from_sequences(case.sequences).compression_ratio for case in cases]
    assert min(ratios) == ratios[0] == 1.0 and max(ratios) > 4
    assert max(len(case.sequences) for case in cases) == 32


def test_checks_see_broken_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    report = importlib.import_module("calibrated_report")
    right = {"measured": 1.0, "predicted": 1.1}
    predicted = [{"tree": right, "dense": right}, {"tree": right, "dense": {"measured": 1.0, "predicted": 0.6}}]
    gated = [{"hidden_size": 64, "ratio": {"wall": ratio, "cpu": 1.0}} for ratio in (0.5, 1.04)]
    found = {check["name"]: check for check in report.checks(predicted, gated, "wall")}
    broken = [name for name, check in found.items() if check["found"] > check["allowed"]]
    assert [name.split(":")[0] for name in broken] == ["dense", "hidden size 64"]
