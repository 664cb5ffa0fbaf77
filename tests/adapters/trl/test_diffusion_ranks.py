"""Two processes under DDP and FSDP2 have the gradients of one process with all rows, and wait for nobody forever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.adapters.trl import diffusion as tiny
from tests.adapters.trl import diffusion_ranks
from tests.adapters.trl.diffusion import Outcome
from tests.adapters.trl.diffusion_ranks import CASES
from tests.recipes.test_trl import launcher_environment
from tests.support.ranks import REPOSITORY, free_port

pytestmark = pytest.mark.long  # two processes each time

WRAPPERS = {"ddp": {}, "fsdp2": launcher_environment("fsdp2", "--mixed_precision", "no")}


@pytest.fixture(scope="module", params=WRAPPERS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """Every case's outcome on both ranks."""
    folder = tmp_path_factory.mktemp(request.param)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [*launcher, "-m", diffusion_ranks.__name__, request.param, str(folder)],
        cwd=REPOSITORY,
        env=os.environ | WRAPPERS[request.param] | quiet,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, ranks: list[dict[str, Outcome]], tmp_path: Path) -> None:
    with patch.object(diffusion_ranks.module, "draw_seeds", diffusion_ranks.fixed_seeds):
        alone = diffusion_ranks.outcome(case, tmp_path, 1)
    assert len(alone.gradients) == 2
    for rank in ranks:
        for own, expected in zip(rank[case].gradients, alone.gradients, strict=True):
            assert tiny.largest_difference(own, expected) < 1e-6
    entries = [outcome.logs[0] for outcome in (alone, ranks[0][case])]
    for name in ("diffusion/mean_abs_d", "diffusion/max_abs_d"):
        assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-3, abs=1e-6)
    assert entries[1]["diffusion/rows_kept"] == entries[0]["diffusion/rows_kept"]
    if "blocks" in case:
        assert all(entry["diffusion/tree_tokens"] < entry["diffusion/flat_tokens"] for entry in entries)
    if "blocks" in case and "idle" not in case:  # an idle rank runs a row at weight 0, which is computed, and counted
        assert entries[1]["diffusion/flat_tokens"] == entries[0]["diffusion/flat_tokens"]


def test_rows_of_another_rank_matter(ranks: list[dict[str, Outcome]]) -> None:
    """Negative control: an idle rank halves what the other one has found; with advantages of its own it does more."""
    idle, busy = (ranks[0][case].gradients[0] for case in ("bgpo, idle rank", "bgpo, checkpointing"))
    assert tiny.largest_difference(idle, busy) > 1e-2


def test_ranks_generate_for_different_times(ranks: list[dict[str, Outcome]]) -> None:
    calls = [rank["generated"].logs[0]["diffusion/model_calls"] for rank in ranks]
    assert calls[0] > calls[1]
    for name, weight in ranks[0]["generated"].weights.items():
        assert torch.equal(weight, ranks[1]["generated"].weights[name]), name
