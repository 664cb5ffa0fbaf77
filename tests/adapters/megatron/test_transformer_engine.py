"""Trees through the layers that Megatron makes for Transformer Engine, on what stands in for it; two ranks, gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import on_two_ranks

LAYOUTS = (
    "packed",
    "biases",
    "padded",
    "fused rotary",
    "fused rotary, padded",
    "grouped experts",
    "full recomputation",
    "selective recomputation",
    "sliding window",
    "tensor",
    "sequence",
    "grouped experts, sequence",
    "experts on ranks",
    "experts on ranks, sequence",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_two_ranks("tests.adapters.megatron.te_script", folder, *LAYOUTS, "layers", "wrong positions")


@pytest.mark.parametrize("job", LAYOUTS)
def test_every_update_is_equal(job: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert max(rank[job]["differences"]) < 1e-5, rank[job]["differences"]
        assert all(step["dta/dense_fallback"] == 0 for step in rank[job]["metrics"])
        assert all(step["dta/compression_ratio"] > 1.2 for step in rank[job]["metrics"])


def test_layers_are_those_of_its_spec(ranks: list[dict[str, Any]]) -> None:
    attention = ["TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"]
    assert ranks[0]["layers"]["qwen3"] == [*attention, "TELayerNormColumnParallelLinear"]
    assert ranks[0]["layers"]["moe"] == [*attention, "TEGroupedMLP"]


def test_negative_control(ranks: list[dict[str, Any]]) -> None:
    assert min(max(rank["wrong positions"]["differences"]) for rank in ranks) > 1e-2
