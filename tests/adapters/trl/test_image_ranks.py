"""Images between ranks: two processes, under DDP and FSDP2, train as stock does, siblings and images on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.trl import image_ranks_script
from tests.adapters.trl.image_ranks_script import CASES, SHARDED
from tests.adapters.trl.support import TOLERANCE, Run, assert_equal, difference, weight_difference
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.adapters.trl.vision import save_vision_model
from tests.recipes.test_trl import launcher_environment
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long  # two processes each time

Runs = dict[str, tuple[Run, Run]]
IGNORED = (*EXTREMES, *TOKEN_MEANS)


def trained(folder: Path, *names: str, environment: dict[str, str] | None = None) -> list[Runs]:
    """The cases' runs on both ranks."""
    model = save_vision_model(folder / "model")
    found, said = under_torchrun(image_ranks_script.__name__, model, folder, *names, environment=environment)
    assert "rows stay on the ranks" not in said
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    return trained(tmp_path_factory.mktemp("ddp"))


def assert_all_equal(ranks: list[Runs], name: str) -> None:
    for runs in ranks:
        dense, tree = runs[name]
        assert_equal(dense, tree, IGNORED, least_ratio=0.9 if name == "nothing_read" else 1.2)
        assert all(torch.equal(weight, ranks[0][name][1].weights[key]) for key, weight in tree.weights.items())


@pytest.mark.parametrize("name", CASES)
def test_equals_stock(ranks: list[Runs], name: str) -> None:
    assert_all_equal(ranks, name)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    layers = ("--fsdp_transformer_layer_cls_to_wrap", "Qwen2_5_VLDecoderLayer,Qwen2_5_VLVisionBlock")
    environment = launcher_environment("fsdp2", "--mixed_precision", "no", *layers)
    return trained(tmp_path_factory.mktemp("fsdp2"), *SHARDED, environment=environment)


@pytest.mark.parametrize("name", SHARDED)
def test_shards_change_nothing(ranks: list[Runs], sharded: list[Runs], name: str) -> None:
    """Where images of ranks differ in size, stock under FSDP2 is 1e-2 from stock under DDP; trees are not, which equal
    the latter."""
    if name == "together":
        assert_all_equal(sharded, name)
    for under_ddp, own in zip(ranks, sharded, strict=True):
        assert weight_difference(under_ddp[name][1], own[name][1]) <= TOLERANCE


def test_a_rank_has_no_images_left(ranks: list[Runs]) -> None:
    """Its rows are one token each."""
    tokens = [[entry["dta/tree_tokens"] for entry in runs["nothing_read"][1].dta] for runs in ranks]
    assert tokens[0] == [1, 1] and min(tokens[1]) > 8


def test_siblings_and_their_images_meet(ranks: list[Runs]) -> None:
    """Both ranks have both prompts of the same text, and then one each; two tokens come before their images."""
    repeated = {
        name: [entry["dta/duplicated_prefix_tokens"] for entry in ranks[0][name][1].dta]
        for name in ("together", "several")
    }
    assert repeated == {"together": [2, 2], "several": [2, 2]}
    tokens = {name: sum(runs[name][1].dta[0]["dta/tree_tokens"] for runs in ranks) for name in ("apart", "together")}
    assert tokens["together"] < tokens["apart"]


def test_negative_control_images_of_other_rows(ranks: list[Runs]) -> None:
    dense, tree = ranks[0]["wrong_images"]
    assert difference(dense, tree, IGNORED) > 1000 * TOLERANCE
