"""The benchmark runs, its contenders agree, and its ceilings are the published ones. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import PNG, python, smoke

CEILINGS = {"1024/64/8": 4.72, "1024/256/8": 2.51, "256/64/8": 2.58, "1024/64/2": 1.82, "128/512/8": 1.12}


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("prefix_grouper")
    result = smoke("policy_update", tmp_path).result
    assert result["star_ceilings"] == pytest.approx(CEILINGS, abs=0.006), "the README's"
    assert [row["name"] for row in result["rows"]] == ["48/8/4", "8/24/3", "no sharing"]
    for row in result["rows"]:
        contenders = {"trl", "dense", "tree"} | ({"prefix_grouper"} if row["name"] != "no sharing" else set())
        for clock in ("wall", "cpu"):
            assert row["seconds"][clock].keys() == contenders
            assert all(len(times) == result["rounds"] for times in row["seconds"][clock].values())
        assert row["milliseconds"].keys() == contenders
        assert row["speed_up_over"].keys() == contenders - {"tree"}
        assert all(0 <= error < 1e-4 for error in row["error"].values())
    star, _, unrelated = result["rows"]
    assert (star["flat_tokens"], star["tree_tokens"], star["scored_tokens"]) == (4 * 56, 48 + 4 * 8, 32)
    assert unrelated["flat_tokens"] == unrelated["tree_tokens"] and unrelated["ceiling"] == pytest.approx(1.0)
    plot = tmp_path / "plot.png"
    python("-m", "benchmarks.policy_update.plot", str(tmp_path / "result.json"), "--output", str(plot))
    assert plot.read_bytes().startswith(PNG)
