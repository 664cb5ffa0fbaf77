"""Two ranks over gloo, one way to use them after the other: equal to stock verl, and of one mind about refusing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import on_two_ranks

SCRIPT = "tests.adapters.megatron.ranks_script"
LAYOUTS = ("tensor", "sequence", "sequence recomputed", "experts", "expert parallel", "padded", "data")
PIPELINES = ("pipeline", "pipeline recomputed", "virtual pipeline")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found, by job; it takes longer to start processes than to run them."""
    jobs = (*LAYOUTS, *PIPELINES, "exported", "disagreeing data", "disagreeing pipeline")
    return on_two_ranks(SCRIPT, tmp_path_factory.mktemp("ranks"), *jobs)


@pytest.mark.parametrize("job", [*LAYOUTS, *PIPELINES])
def test_two_ranks(job: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert max(rank[job]["differences"]) < 1e-5, rank[job]["differences"]
    metrics = ranks[1][job]["metrics"]  # the last stage of a pipeline has them
    assert all(step["dta/dense_fallback"] == 0 for step in metrics)
    assert all(step["dta/compression_ratio"] > 1.2 for step in metrics)


def test_exported_weights(ranks: list[dict[str, Any]]) -> None:
    """Every rank gives whole weights to its rollout, by the names and with the values of the model's files."""
    for rank in ranks:
        for name, found in rank["exported"].items():
            assert found["same"] and not found["unmoved"], name


def test_ranks_refuse_together(ranks: list[dict[str, Any]]) -> None:
    """Only rank 1 has something that a tree cannot follow: a batch of its own, or a layer of its stage."""
    for rank in ranks:
        assert "routed_experts" in rank["disagreeing data"]["error"]
        assert "layer 2 attends by GatedDeltaNet" in rank["disagreeing pipeline"]["error"]
        assert rank["disagreeing pipeline"]["dense"] == 0
