"""Images between ranks: two processes under DDP train as stock does, with siblings and their images on one rank."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.trl import image_ranks_script
from tests.adapters.trl.image_ranks_script import CASES
from tests.adapters.trl.support import TOLERANCE, Run, assert_equal, difference
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.adapters.trl.vision import save_vision_model
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long  # two processes each time

Runs = dict[str, tuple[Run, Run]]
IGNORED = (*EXTREMES, *TOKEN_MEANS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    """Every case's runs on both ranks."""
    folder = tmp_path_factory.mktemp("images")
    found, said = under_torchrun(image_ranks_script.__name__, save_vision_model(folder / "model"), folder)
    assert "rows stay on the ranks" not in said
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_stock(ranks: list[Runs], name: str) -> None:
    for runs in ranks:
        dense, tree = runs[name]
        assert_equal(dense, tree, IGNORED)
        assert all(torch.equal(weight, ranks[0][name][1].weights[key]) for key, weight in tree.weights.items())


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
