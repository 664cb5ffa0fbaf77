"""Two processes under DDP: equal to stock DDP, on ranks whose trees differ in size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.trl.ddp_script import CASES
from tests.adapters.trl.support import Run, assert_equal
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long  # two processes each time

Runs = dict[str, tuple[Run, Run]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(model: str, folder: Path) -> tuple[list[Runs], str]:
    """Every case's runs on both ranks, and what was printed."""
    return under_torchrun("tests.adapters.trl.ddp_script", model, folder)


@pytest.mark.parametrize("name", CASES)
def test_ddp_equals_stock_ddp(ranks: tuple[list[Runs], str], name: str) -> None:
    runs, _ = ranks
    ignore = (*EXTREMES, *TOKEN_MEANS) if "steps_per_generation" in CASES[name] else ()
    if any(entry["dta/pruned_tokens"] for rank in range(2) for entry in runs[rank][name][1].dta):
        ignore = (*ignore, "entropy")  # of the tokens that ran, on all ranks
    for rank in range(2):
        dense, tree = runs[rank][name]
        assert_equal(dense, tree, ignore=ignore)
        assert all(torch.equal(weight, runs[0][name][1].weights[key]) for key, weight in tree.weights.items())
    sizes = [[entry["dta/tree_tokens"] for entry in runs[rank][name][1].dta] for rank in range(2)]
    assert sizes[0] != sizes[1]


def test_only_the_main_process_speaks(ranks: tuple[list[Runs], str]) -> None:
    _, printed = ranks
    assert printed.count(" on cpu") == len(CASES)
    assert printed.count("verified against dense") == 1


@pytest.mark.usefixtures("ranks")
def test_only_the_main_process_draws(folder: Path) -> None:
    assert [path.parent.name for path in folder.rglob("tree.svg")] == ["of_rank0"]
