"""The benchmark of the kernels runs in Triton's interpreter, and all candidates compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import smoke


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = smoke("kernels", tmp_path, "--device", "cpu")
    rows = done.result["rows"]
    assert {row["kernel"] for row in rows} == {"forward", "query_gradient", "key_gradient"}
    for kernel in ("forward", "query_gradient", "key_gradient"):
        own = [row for row in rows if row["kernel"] == kernel]
        assert len(own) > 1 and sum(row["of_table"] for row in own) == 1
    assert all(row["ms"] > 0 and row["difference"] < 1e-6 for row in rows)
    assert f"{len(rows)} of {len(rows)} rows measured" in done.printed
