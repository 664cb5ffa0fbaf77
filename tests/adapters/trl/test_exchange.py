"""Rows between ranks: two processes under DDP train as stock does, with siblings that were generated apart together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dta_plugin.adapters.trl import exchange, losses
from dta_plugin.balance.costs import TYPICAL
from tests.adapters.trl.exchange_script import CASES
from tests.adapters.trl.support import Run, assert_equal, difference
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long  # two processes each time

Runs = dict[str, tuple[Run, Run]]
EXACT = 5e-6
# One micro-batch per step: whoever computes a row, TRL's metrics are over the same ones.
ONE_MICRO_BATCH = ("apart", "together", "declined")


@pytest.fixture(scope="module")
def ranks(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Runs], str]:
    """Every case's runs on both ranks, and what was printed."""
    return under_torchrun("tests.adapters.trl.exchange_script", model, tmp_path_factory.mktemp("exchange"))


def offer(**shapes: tuple[torch.dtype, tuple[int, ...]]) -> exchange._Offer:
    ids = {"prompt_ids": (torch.int64, (5,)), "completion_ids": (torch.int64, (7,))}
    return exchange._Offer(None, TYPICAL, sizes=[4, 4], shapes=ids | shapes)


WIDER = {"completion_ids": (torch.int64, (9,))}
MISMATCHES: dict[str, tuple[list[exchange._Offer], str | None]] = {
    "alike": ([offer(x=(torch.float32, (3,)))] * 2, None),
    "padded": ([offer(old=(torch.float32, (7,))), offer(old=(torch.float32, (9,)), **WIDER)], None),
    "sequence_level": ([offer(ratio=(torch.float32, (1,))), offer(ratio=(torch.float32, (1,)), **WIDER)], None),
    "unknown_padding": ([offer(x=(torch.float32, (3,))), offer(x=(torch.float32, (4,)))], "x has different widths"),
    "dtypes": ([offer(x=(torch.float32, (7,))), offer(x=(torch.int64, (7,)))], "x is of different kinds"),
    "missing": ([offer(x=(torch.float32, ())), offer()], "x is of different kinds"),
    "extra": ([offer(), offer(x=(torch.float32, ()))], "x is not there on every rank"),
    "rows": ([offer(), exchange._Offer(None, TYPICAL, sizes=[4, 3])], "ranks have different numbers of rows"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_rows_of_ranks_must_fit(name: str) -> None:
    offers, reason = MISMATCHES[name]
    found = exchange._mismatch(offers)
    assert found is None if reason is None else str(found).startswith(reason)


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(parallel: int = 1, batch: dict[str, Any] | None = None, **options: Any) -> str | None:
        accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(non_data_parallel_size=parallel))
        hooks = {"model": torch.nn.Linear(1, 1), "callback_handler": SimpleNamespace(callbacks=[])}
        return exchange._obstacle(SimpleNamespace(accelerator=accelerator, **hooks, **options), [batch or {}])

    assert obstacle() is obstacle(loss_type="luspo") is None
    assert "pixel_values without num_images" in str(obstacle(batch={"pixel_values": torch.ones(2)}))
    assert "tensor, context or sequence parallelism" in str(obstacle(parallel=2))
    assert "each micro-batch" in str(obstacle(top_entropy_quantile=0.5))
    monkeypatch.setattr(losses, "version", lambda _: "1.9.2")
    assert "padding before TRL 1.10" in str(obstacle(loss_type="luspo"))
    assert obstacle(loss_type="grpo") is None


def logged(ranks: list[Runs], case: str, metric: str) -> list[list[float]]:
    """Per rank, the metric of every optimizer step."""
    return [[entry[f"dta/{metric}"] for entry in runs[case][1].dta] for runs in ranks]


@pytest.mark.parametrize("name", CASES)
def test_equals_stock(ranks: tuple[list[Runs], str], name: str) -> None:
    ignore = () if name in ONE_MICRO_BATCH else (*EXTREMES, *TOKEN_MEANS)
    for runs in ranks[0]:
        dense, tree = runs[name]
        assert_equal(dense, tree, ignore)
        assert difference(dense, tree, ignore) <= EXACT
        assert all(torch.equal(weight, ranks[0][0][name][1].weights[key]) for key, weight in tree.weights.items())


def test_negative_control_padding(ranks: tuple[list[Runs], str]) -> None:
    """Rows do move in the case "corrected", to a rank of another width."""
    dense, tree = ranks[0][0]["wrong_padding"]
    assert difference(dense, tree, (*EXTREMES, *TOKEN_MEANS)) > 1000 * EXACT


def test_siblings_meet(ranks: tuple[list[Runs], str]) -> None:
    """Both ranks have both prompts of 16 tokens, and then one each."""
    apart, together = (logged(ranks[0], case, "tree_tokens") for case in ("apart", "together"))
    for step in range(2):
        saved = [before[step] - after[step] for before, after in zip(apart, together, strict=True)]
        assert sum(saved) >= 2 * 16 and min(saved) >= 8
    assert logged(ranks[0], "together", "duplicated_prefix_tokens") == [[0, 0]] * 2


def test_loads_are_those_of_all_ranks(ranks: tuple[list[Runs], str]) -> None:
    for name in CASES:
        for metric in ("rank_load_predicted", "rank_load_measured", "duplicated_prefix_tokens"):
            first, second = logged(ranks[0], name, metric)
            assert first == second
            assert all(1 <= value <= 2 for value in first) or metric == "duplicated_prefix_tokens"
    assert max(logged(ranks[0], "together", "rank_load_predicted")[0]) < 1.05


def test_says_why_rows_stay(ranks: tuple[list[Runs], str]) -> None:
    assert ranks[1].count("rows stay on the ranks that generated them because loss_type='bnpo'") == 1
    assert ranks[1].count("rows stay on the ranks") == 1
