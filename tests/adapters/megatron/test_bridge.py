"""verl's default, Megatron-Bridge, with and without LoRA: `make test-bridge`, in an environment of its own.

It wants Transformer Engine's layers, which here extend what stands in for it; two ranks over gloo.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import on_two_ranks

JOBS = (
    "bridge",
    "bridge, tied",
    "bridge, padded",
    "bridge, experts",
    "bridge, lora",
    "bridge, lora, recomputed",
    "bridge, lora, experts",
    "bridge, lora, sequence",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(
        "tests.adapters.megatron.te_script", tmp_path_factory.mktemp("ranks"), *JOBS, "bridge, wrong positions"
    )


@pytest.mark.parametrize("job", JOBS)
def test_every_update_is_equal(job: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert max(rank[job]["differences"]) < 1e-5, rank[job]["differences"]
        assert all(step["dta/dense_fallback"] == 0 for step in rank[job]["metrics"])


def test_negative_control(ranks: list[dict[str, Any]]) -> None:
    assert min(max(rank["bridge, wrong positions"]["differences"]) for rank in ranks) > 1e-2
