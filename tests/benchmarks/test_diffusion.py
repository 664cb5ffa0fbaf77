"""The benchmarks of diffusion updates run: two ways agree, and one needs ever more memory. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import PNG, python, smoke


@pytest.mark.long
def test_memory(tmp_path: Path) -> None:
    done = smoke("diffusion.memory", tmp_path)
    rows = done.result["rows"]
    assert [row["samples"] for row in rows] == [1, 2, 4]
    first = rows[0]["saved_bytes"]
    for row in rows:
        assert row["saved_bytes"]["loop"] == pytest.approx(first["loop"], rel=0.05)
        assert row["saved_bytes"]["one_graph"] == pytest.approx(row["samples"] * first["one_graph"], rel=0.05)
        assert row["error"] < 1e-5
    assert "ms per sample, loop" in done.printed


@pytest.mark.slow
def test_objectives(tmp_path: Path) -> None:
    """Every setting once; a second call repeats nothing."""
    built, plot = tmp_path / "built", tmp_path / "curves.png"
    python("recipes/verl/diffusion.py", str(built / "diffusion"))
    python("recipes/quickstart/diffusion.py", "--steps", "20", "--output", str(built / "quickstart_diffusion"))
    done = smoke("diffusion.objectives", tmp_path, "--folder", str(built), "--workers", "1")
    runs = done.result["runs"]
    assert [len(run["reward"]) for run in runs] == [2 if run["updates"] == 1 else 1 for run in runs]
    assert len({(run["task"], run["remasking"], run["updates"], run["name"]) for run in runs}) == len(runs) == 32
    again = smoke("diffusion.objectives", tmp_path, "--folder", str(built), "--plot", str(plot))
    assert again.result == done.result and plot.read_bytes().startswith(PNG)
    assert "fall" in done.printed.split("|")[0] and "fall" not in again.printed.split("|")[0]


@pytest.mark.slow
def test_learning(tmp_path: Path) -> None:
    built, plot = tmp_path / "built", tmp_path / "curves.png"
    python("recipes/quickstart/diffusion.py", "--steps", "20", "--output", str(built))
    done = smoke("diffusion.learning", tmp_path, "--folder", str(built), "--plot", str(plot))
    assert plot.read_bytes().startswith(PNG)
    assert [len(run["reward"]) for run in done.result["runs"]] == [2, 2, 2]
    assert all(name in done.printed for name in ("bgpo", "vrpo", "diffu-grpo"))


@pytest.mark.long
def test_sampling(tmp_path: Path) -> None:
    """With attention that is causal over blocks a cache changes no sample; the benchmark itself fails where it does."""
    done = smoke("diffusion.sampling", tmp_path)
    rows = {(row["attention"], row["way"]): row for row in done.result["rows"]}
    cached = [rows["blocks", way] for way in ("prefix", "threshold, prefix")]
    assert all(row["same_in_float64"] for row in cached)
    assert cached[0]["model_calls"] == rows["blocks", "none"]["model_calls"]
    assert all(row["speed_up"] > 0 and 0 <= row["legal"] <= 1 for row in rows.values())
    assert "tokens/s" in done.printed


@pytest.mark.slow
def test_sampler_learning(tmp_path: Path) -> None:
    built = tmp_path / "built"
    python("recipes/quickstart/diffusion.py", "--steps", "20", "--output", str(built))
    done = smoke("diffusion.sampler_learning", tmp_path, "--folder", str(built))
    assert [len(run["reward"]) for run in done.result["runs"]] == [2] * 8
    assert all(name in done.printed for name in ("bgpo, prefix", "trajectory, dual", "confidence_threshold 0.9"))
