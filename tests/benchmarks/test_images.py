"""The benchmark of updates with images runs, its contenders agree, and the tower is in its ceiling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = smoke("images", tmp_path).result["rows"]
    assert [row["family"] for row in rows] == ["qwen3_vl", "qwen3_vl", "qwen2_5_vl", "qwen2_5_vl"]
    for row in rows:
        own = ["text_class"] if row["name"] == "text alone" else ["trl", "dense"]
        assert row["milliseconds"].keys() == {*own, "tree"} and row["speed_up_over"].keys() == {*own}
        assert max(row["error"].values()) < 1e-5
        assert (row["flat_tokens"], row["tree_tokens"]) == (3 * (4 + 2 + 8 + 6), 4 + 2 + 8 + 3 * 6)
        if row["ceiling"] is not None:
            assert 0.1 < row["tower_share"] < 0.5 and 1.5 < row["ceiling"] < 3
