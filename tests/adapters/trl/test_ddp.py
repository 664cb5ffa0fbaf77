"""Two processes under DDP: equal to stock DDP, on ranks whose trees differ in size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.adapters.trl.ddp_script import CASES
from tests.adapters.trl.support import Run, assert_equal
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.support.ranks import REPOSITORY, free_port

Runs = dict[str, tuple[Run, Run]]


@pytest.fixture(scope="module")
def ranks(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Runs], str]:
    """Every case's runs on both ranks, and what was printed."""
    folder = tmp_path_factory.mktemp("ddp")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, "-m", "tests.adapters.trl.ddp_script", model, str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return loaded, done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_ddp_equals_stock_ddp(ranks: tuple[list[Runs], str], name: str) -> None:
    runs, _ = ranks
    for rank in range(2):
        dense, tree = runs[rank][name]
        assert_equal(dense, tree, ignore=(*EXTREMES, *TOKEN_MEANS) if "steps_per_generation" in CASES[name] else ())
        assert all(torch.equal(weight, runs[0][name][1].weights[key]) for key, weight in tree.weights.items())
    sizes = [[entry["dta/tree_tokens"] for entry in runs[rank][name][1].dta] for rank in range(2)]
    assert sizes[0] != sizes[1]


def test_only_the_main_process_speaks(ranks: tuple[list[Runs], str]) -> None:
    _, printed = ranks
    assert printed.count(" on cpu") == len(CASES)
    assert printed.count("verified against dense") == 1
