"""The balancing benchmark runs, and no way to deal is below the lower bound. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import PNG, smoke

BATCHES = {"16 x 4": (16, 64), "combs 6 x 2": (6, None), "one tree": (1, 24)}
BASELINES = {"contiguous", "longest first", "random"}


def test_smoke_run(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "result.png"
    done = smoke("balance", tmp_path, "--plot", str(plot))
    assert plot.read_bytes().startswith(PNG)
    assert done.result["large"].keys() == {"sequences", "tokens", "bins", "wall", "cpu"}
    rows = done.result["rows"]
    assert [(row["name"], row["bins"]) for row in rows] == [(name, bins) for name in BATCHES for bins in (2, 4)]
    for row in rows:
        groups, sequences = BATCHES[row["name"]]
        assert row["groups"] == groups and row["sequences"] == (sequences or row["sequences"])
        assert row["tree_tokens"] < row["flat_tokens"]
        divides = row["sequences"] % row["bins"] == 0
        assert row["contenders"].keys() == {"ours"} | BASELINES | ({"equal counts"} if divides else set())
        for result in row["contenders"].values():
            assert result["over_bound"] == pytest.approx(result["max_load"] / row["lower_bound"])
            assert result["over_bound"] >= 1 - 1e-9 and result["repeated"] >= -1e-9
            fewest, most = result["sequences"]
            assert fewest <= row["sequences"] / row["bins"] <= most
        if divides:
            assert row["contenders"]["equal counts"]["sequences"] == [row["sequences"] // row["bins"]] * 2
    assert len(done.result["checks"]) == 2 + 3 + 1 + 1
    for check in done.result["checks"]:
        assert check["met"] == (not check["exceptions"])
        assert f"{check['claim']}: worst {check['worst']:.4f}, {'met' if check['met'] else 'NOT MET'}" in done.printed
        assert all(f"    {exception}\n" in done.printed for exception in check["exceptions"])
