"""Two ranks over gloo: equal to stock verl, with different trees on each, and of one mind about falling back."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tests.support.ranks import on_two_ranks

VERL_08 = Version(version("verl")) < Version("0.9")
SCRIPT = "tests.adapters.verl.ranks_script"


def _check(ranks: list[dict[str, Any]], job: str) -> None:
    for rank in ranks:
        assert max(rank[job]["differences"]) < 1e-5, rank[job]["differences"]
        assert all(metrics["dta/dense_fallback"] == 0 for metrics in rank[job]["metrics"])
    first, second = (rank[job]["metrics"] for rank in ranks)
    assert [m["dta/micro_batches"] for m in first] == [m["dta/micro_batches"] for m in second]
    assert any(a["dta/tree_tokens"] != b["dta/tree_tokens"] for a, b in zip(first, second, strict=True))


def test_two_ranks(tmp_path: Path) -> None:
    ranks = on_two_ranks(SCRIPT, tmp_path, "fsdp2:full", "fsdp:lora", "disagreeing", "selecting", "critic")
    _check(ranks, "fsdp2:full")
    _check(ranks, "fsdp:lora")
    for rank in ranks:
        assert max(max(found) for found in rank["critic"]["differences"].values()) < 1e-5
        assert rank["disagreeing"]["difference"] < 1e-5
        assert "routed_experts" in rank["disagreeing"]["error"]
    calls = [rank["disagreeing"]["calls"] for rank in ranks]
    assert calls[0] == calls[1]
    assert calls[0][0] == calls[0][1] > 0  # min_saving=0.9 ran verl's own path
    _check_selection(*(rank["selecting"] for rank in ranks))


def _check_selection(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Each rank draws for itself, one of them from nothing; they have the same metrics and errors."""
    assert first["metrics"].keys() == second["metrics"].keys()
    assert first["metrics"]["dta/kept_fraction"] < 1 == second["metrics"]["dta/kept_fraction"]
    assert second["metrics"]["dta/tree_tokens"] < 5 < first["metrics"]["dta/tree_tokens"]
    assert first["metrics"]["dta/micro_batches"] == second["metrics"]["dta/micro_batches"]
    assert first["gradient"].any() and second["gradient"].any()
    assert first["error"] == second["error"] and "return_model_output" in first["error"]


@pytest.mark.skipif(VERL_08, reason="verl 0.8 tells no layer where packed rows begin")
@pytest.mark.parametrize("job", ["recurrent", pytest.param("recurrent further", marks=pytest.mark.slow)])
def test_recurrent_layers_on_two_ranks(job: str, tmp_path: Path) -> None:
    _check(on_two_ranks(SCRIPT, tmp_path, job), job)


@pytest.mark.parametrize("job", ["pictures", pytest.param("pictures further", marks=pytest.mark.slow)])
def test_pictures_on_two_ranks(job: str, tmp_path: Path) -> None:
    """On one of them, some micro-batches have none."""
    _check(on_two_ranks(SCRIPT, tmp_path, job), job)


@pytest.mark.slow
def test_two_ranks_further(tmp_path: Path) -> None:
    ranks = on_two_ranks(SCRIPT, tmp_path, "fsdp:full", "fsdp2:lora")
    _check(ranks, "fsdp:full")
    _check(ranks, "fsdp2:lora")
