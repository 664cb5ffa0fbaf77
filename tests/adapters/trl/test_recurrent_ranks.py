"""Models with recurrent layers in two processes, under DDP and FSDP2: equal to stock TRL under the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.trl import recurrent_ranks_script
from tests.adapters.trl.hybrids import needs_them, save_hybrid
from tests.adapters.trl.recurrent_ranks_script import CASES
from tests.adapters.trl.support import assert_equal
from tests.recipes.test_trl import launcher_environment
from tests.support.ranks import under_torchrun

pytestmark = [needs_them, pytest.mark.long]  # two processes each time
# The text class names a layer of its images, too, which accelerate does not find.
LAYER = ("--fsdp_transformer_layer_cls_to_wrap", "Qwen3_5DecoderLayer")
WRAPPERS = {"ddp": {}, "fsdp2": launcher_environment("fsdp2", "--mixed_precision", "no", *LAYER)}


@pytest.fixture(scope="module", params=WRAPPERS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Every case's runs on both ranks."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_hybrid("qwen3_5_text", folder / "model")
    return under_torchrun(recurrent_ranks_script.__name__, model, folder, environment=WRAPPERS[request.param])[0]


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(ranks: list[Any], name: str) -> None:
    for rank in ranks:
        dense, tree = rank[name]
        assert_equal(dense, tree)
        assert all(torch.equal(weight, ranks[0][name][1].weights[key]) for key, weight in tree.weights.items())
    chunks = [[entry["dta/chunks"] for entry in rank[name][1].dta] for rank in ranks]
    assert ("chunks" in name) == (min(chunks[0]) > 1)
