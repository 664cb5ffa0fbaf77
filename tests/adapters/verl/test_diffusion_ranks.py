"""Two ranks over gloo: the gradient of all rows, also where a rank has nothing to learn from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tests.support.ranks import on_two_ranks


def test_two_ranks(tmp_path: Path) -> None:
    ranks = on_two_ranks("tests.adapters.verl.diffusion_ranks_script", tmp_path)
    for job in ("both", "one_sided"):
        assert all(rank[job]["difference"] < 1e-5 for rank in ranks), job
        expected = ranks[0][job]["loss"][1]
        assert sum(rank[job]["loss"][0] for rank in ranks) / 2 == pytest.approx(expected, abs=1e-5)
        assert ranks[0][job]["metrics"] == ranks[1][job]["metrics"]
    for rank in ranks:
        assert rank["held"]["difference"] < 1e-5 and rank["held"]["metrics"]["diffusion/rows_kept"] == 16
    assert ranks[1]["one_sided"]["loss"][0] == 0
    for metrics in (rank["nothing"]["metrics"] for rank in ranks):
        assert (metrics["diffusion/rows_kept"], metrics["diffusion/rows_skipped"]) == (0, 16)
        assert metrics["diffusion/max_abs_d"] == 0 and "diffusion/elbo" not in metrics
    assert [rank["nothing"]["norm"] for rank in ranks] == [0, 0]
