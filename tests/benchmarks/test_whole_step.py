"""The benchmark of whole GRPO steps runs; both trainers sample the same and have the same loss and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = smoke("whole_step", tmp_path).result["rows"]
    assert [row["name"] for row in rows] == ["32/8/4", "16/8/4 x 2"]
    for row in rows:
        assert row["error"] < 1e-5
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.1)  # medians of rounds, each of which has 1
        assert all(part > 0 for contender in row["milliseconds"].values() for part in contender.values())
        assert row["speed_up"].keys() == {"update", "step"}
