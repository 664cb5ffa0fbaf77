"""AsyncGRPO in two processes under DDP: the weights of a loop without TRL, over both ranks' samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.adapters.trl.async_ddp_script import CASES, RANKS, STEPS, rollouts
from tests.adapters.trl.async_rollouts import BATCH, dense_model, dense_training, save
from tests.adapters.trl.support import TOLERANCE, VOCABULARY
from tests.support.models import tiny_config
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async_models")
    for family, _, _ in CASES.values():
        save(tiny_config(family, vocab_size=VOCABULARY), folder / family)
    return folder


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return under_torchrun("tests.adapters.trl.async_ddp_script", str(models), tmp_path_factory.mktemp("async_ddp"))[0]


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_a_loop_without_trl(ranks: list[Any], models: Path, case: str) -> None:
    family, run, options = CASES[case]
    dense = dense_model(str(models / family))
    start = {name: p.detach().clone() for name, p in dense.named_parameters()}
    dense_training(dense, rollouts(case), STEPS, run.get("gradient_accumulation_steps", 1), batch=RANKS * BATCH)
    for weights, logged in (rank[case] for rank in ranks):
        for name, weight in dense.named_parameters():
            assert (weights[name] - weight).norm() <= TOLERANCE * weight.norm(), name
        assert max((weights[name] - x).norm() / x.norm() for name, x in start.items()) > 0.01
        assert all(entry["dta/streamed"] == bool(options) and entry["dta/dense_fallback"] == 0 for entry in logged)
