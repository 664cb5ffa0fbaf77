"""The dense path in two processes under DDP, where not every rank has images: equal to one process on both batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.execution import image_ranks_script
from tests.execution.image_ranks_script import CASES, FAMILY
from tests.support.oracle import dense
from tests.support.ranks import on_two_ranks
from tests.support.vision_models import vision_model
from tests.support.widened import widened

pytestmark = pytest.mark.long  # two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_two_ranks(image_ranks_script.__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_gradients(ranks: list[dict[str, dict[str, torch.Tensor]]], name: str) -> None:
    model = vision_model(FAMILY)
    with widened():
        parts = [
            dense(model, rows.sequences, more=rows.dense_inputs(model)).gradients
            for rows in CASES[name][0]
            if rows.sequences
        ]
    expected = {key: torch.stack([part[key] for part in parts]).sum(dim=0) / 2 for key in parts[0]}
    largest = max(gradient.norm() for gradient in expected.values())
    for found in ranks:
        assert max((found[name][key] - expected[key]).norm() / largest for key in expected) < 1e-12
