"""AsyncGRPO in two processes, under DDP and FSDP2: the weights of a loop without TRL, over both ranks' samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.trl import async_ranks_script
from tests.adapters.trl.async_ranks_script import CASES, RANKS, STEPS, rollouts
from tests.adapters.trl.async_rollouts import BATCH, dense_model, dense_training, save
from tests.adapters.trl.support import TOLERANCE, VOCABULARY
from tests.recipes.test_trl import launcher_environment
from tests.support.models import tiny_config
from tests.support.ranks import REPOSITORY, free_port

pytestmark = pytest.mark.long
WRAPPERS = {"ddp": {}, "fsdp2": launcher_environment("fsdp2", "--mixed_precision", "no")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async_models")
    for family, _, _ in CASES.values():
        save(tiny_config(family, vocab_size=VOCABULARY), folder / family)
    return folder


@pytest.fixture(scope="module", params=WRAPPERS)
def ranks(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp(request.param)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, "-m", async_ranks_script.__name__, request.param, str(models), str(folder)],
        cwd=REPOSITORY,
        env=os.environ | WRAPPERS[request.param] | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


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
        assert all((entry["dta/chunks"] > 1) == bool(options) and entry["dta/dense_fallback"] == 0 for entry in logged)
