"""The calibration benchmark runs, on batches that share as the docs say. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.calibrated.workloads import graded
from dta_plugin import PrefixTree
from tests.benchmarks.running import PNG, smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "result.png"
    result = smoke("calibrated", tmp_path, "--plot", str(plot)).result
    assert result.keys() >= {"benchmark", "clock", "model"}
    assert len(result["predicted"]) == 5 and len(result["gated"]) == 5 and len(result["checks"]) == 3
    for row in result["predicted"]:
        assert row["tree"]["measured"] > 0 and row["dense"]["predicted"] > 0
    assert {row["ran"] for row in result["gated"]} <= {"tree", "dense"}
    assert plot.read_bytes().startswith(PNG)


def test_graded_batches_go_from_no_sharing_to_a_star_of_32() -> None:
    cases = list(graded(8192))
    assert len(cases) == 40 and len({case.name for case in cases}) == 40
    ratios = [PrefixTree.from_sequences(case.sequences).compression_ratio for case in cases]
    assert min(ratios) == ratios[0] == 1.0 and max(ratios) > 4
    assert max(len(case.sequences) for case in cases) == 32
