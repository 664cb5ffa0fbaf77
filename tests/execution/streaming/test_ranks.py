"""Streamed execution in two processes, under DDP and FSDP2: equal to one process on the union of both batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.execution.streaming.ranks_script import SPLITS, WRAPPINGS, Batches
from tests.support.models import softmax_in_own_dtype
from tests.support.oracle import GRADIENT_FLOOR, dense, functional
from tests.support.ranks import on_two_ranks

pytestmark = pytest.mark.long  # two processes each time

SCRIPT = "tests.execution.streaming.ranks_script"


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def expected(name: str, batches: Batches) -> dict[str, torch.Tensor]:
    """Gradients of the mean over ranks by the unmodified model, in one process."""
    model = WRAPPINGS[name][0]()
    union = [sequence for batch in batches for sequence in batch]

    def loss(logprobs: list[torch.Tensor], entropies: list[torch.Tensor]) -> torch.Tensor:
        rows = zip(logprobs, entropies, strict=True)
        return torch.stack([functional([p], [e], seed=i) for i, (p, e) in enumerate(rows)]).sum() / 2

    return dense(model, union, loss=loss).gradients


def error(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient."""
    assert actual.keys() == truth.keys()
    floor = GRADIENT_FLOOR * max(max(g.norm() for g in truth.values()), 1e-12)
    return max(float((actual[key] - g).norm() / g.norm().clamp(min=floor)) for key, g in truth.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = [f"splits:{name}" for name in WRAPPINGS]
    jobs += [f"{job}:{name}" for job in ("events", "failing_chunk", "gate_and_dense") for name in ("ddp", "fsdp2")]
    jobs.append("gathered_units:")
    return on_two_ranks(SCRIPT, tmp_path_factory.mktemp("ranks"), *jobs)


@pytest.mark.parametrize("split", [*SPLITS, "5 and 1, auto", "5 and 0, auto"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_equal_to_one_process(ranks: list[dict[str, Any]], name: str, split: str) -> None:
    truth = expected(name, SPLITS[split.removesuffix(", auto")])
    results = [rank[f"splits:{name}"][split] for rank in ranks]
    assert max(error(gradients, truth) for _, gradients in results) < (3e-5 if "delta rules" in name else 1e-9)
    if split in ("5 and 1", "5 and 0"):
        assert [chunks for chunks, _ in results] == [5, 1]


def test_negative_control_another_batch_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    truth = expected("fsdp2", [SPLITS["5 and 1"][0], SPLITS["0 and 1"][1]])
    assert error(ranks[0]["splits:fsdp2"]["5 and 1"][1], truth) > 1e-3


@pytest.mark.parametrize("seeds", ["0-36", pytest.param("36-236", marks=pytest.mark.slow)])
def test_random_splits(tmp_path: Path, seeds: str) -> None:
    results = [rank[f"random_splits:{seeds}"] for rank in on_two_ranks(SCRIPT, tmp_path, f"random_splits:{seeds}")]
    for (batches, name, actual), (_, _, other) in zip(*results, strict=True):
        truth = expected(name, batches)
        assert max(error(actual, truth), error(other, truth)) < 1e-9, (name, batches)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_gradients_travel_once_and_while_others_are_computed(ranks: list[dict[str, Any]], name: str) -> None:
    events, other = (rank[f"events:{name}"] for rank in ranks)
    first = events.index("reduce")
    assert "layer 0" in events[:first], "not before the other chunks are done"
    assert "layer 0" in events[first:], "not after the last one is"
    assert events.count("reduce") == other.count("reduce") > 1
    if name == "fsdp2":
        assert events.count("reduce") == 3, "one per layer and one for the rest"


def test_chunks_gather_no_more_weights_at_a_time_than_a_packed_pass(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["gathered_units:"]
        assert found["streamed"] <= found["packed"] + 1 < 9
        assert (found["packed, after"], found["streamed, after"]) == (0, 0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_an_error_inside_a_chunk_leaves_no_gradient_and_a_retry_is_right(
    ranks: list[dict[str, Any]], name: str
) -> None:
    truth = expected(name, SPLITS["both"])
    for rank in ranks:
        result = rank[f"failing_chunk:{name}"]
        assert (result["message"], result["left"]) == ("simulated", [])
        assert error(result["retry"][1], truth) < 1e-9


def test_a_killed_rank_leaves_no_gradient_on_the_other(tmp_path: Path) -> None:
    (survivor,) = on_two_ranks(SCRIPT, tmp_path, "killed_rank:fsdp2", dies=True)
    assert survivor["killed_rank:fsdp2"]["message"] != "no error"
    assert survivor["killed_rank:fsdp2"]["left"] == []


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_ranks_decide_together_and_dense_calls_match(ranks: list[dict[str, Any]], name: str) -> None:
    """A star of 6 saves two thirds, a single sequence nothing: together enough for a gate of 0.3, not of 0.9."""
    for rank in ranks:
        tree, by_dense = rank[f"gate_and_dense:{name}"]
        assert (tree[0], by_dense[0]) == ("packed", "dense")
        assert "on all ranks" in tree[1]
        assert error(tree[2], by_dense[2]) < 1e-9
