"""The benchmark of regrouping runs, compares one training with another dealing of its rows, and notices any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.regrouping.__main__ import compared
from tests.benchmarks.running import python, smoke

ENTRY = {"loss": 1.0, "reward": 0.5, "completions/mean_length": 9.0, "entropy": 0.2, "clip_ratio/low_mean": 0.0}


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    """Loss and gradient stay, but for a Qwen3's norms, which are float32 in any model; the entropy does not."""
    python("recipes/quickstart/build.py", "--output", str(tmp_path), "--steps", "40", "--prompts", "64")
    rows = smoke("regrouping", tmp_path, "--folder", str(tmp_path)).result["rows"]
    found = {row["metric"]: row["largest"] for row in rows}
    assert max(found["loss"], found["grad_norm"]) < 1e-5 and found["entropy"] > 1e-3


def test_differences_are_relative_to_what_stock_logs() -> None:
    other = [ENTRY | {"entropy": 0.3}, ENTRY | {"entropy": 0.2, "loss": -1.0}]
    loss, entropy = compared([ENTRY, ENTRY | {"loss": -1.0}], other)
    assert loss == {"metric": "loss", "stock": 0.0, "mean": 0.0, "largest": 0.0}
    assert entropy == {"metric": "entropy", "stock": 0.2, "mean": pytest.approx(0.25), "largest": pytest.approx(0.5)}


@pytest.mark.parametrize("name", ["reward", "completions/mean_length"])
def test_trainings_that_sampled_otherwise_are_not_compared(name: str) -> None:
    with pytest.raises(RuntimeError, match=name):
        compared([ENTRY], [ENTRY | {name: 0.25}])
