"""The benchmark of the recurrent operations runs, and both sides of it compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    rows = smoke("recurrent", tmp_path).result["rows"]
    assert [row["op"] for row in rows] == ["conv", "delta", "kda"]
    assert all(row["cpu"] > 0 and row["difference"] < 1e-5 for row in rows)
