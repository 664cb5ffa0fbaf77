"""The benchmark of SFT and DPO steps runs, and both contenders agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = smoke("offline", tmp_path).result["rows"]
    assert [(row["flat_tokens"], row["tree_tokens"]) for row in rows] == [(75, 35), (84, 35), (34, 34)]
    for row in rows:
        assert row["milliseconds"].keys() == {"stock", "tree"} and row["error"] < 1e-5
