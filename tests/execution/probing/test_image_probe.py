"""What a model with images is probed with: no more of a row than tells, however large its images are."""

from __future__ import annotations

import pytest
import torch

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.execution.probing.forest import image_forest
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.models.vision import batch_images
from dta_plugin.models.vision.units import row_units
from tests.support.vision_images import IMAGE, Rows
from tests.support.vision_models import SCENARIOS, rows_of, vision_model

GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def large(tokens: int = 60) -> Rows:
    """Siblings behind an image of 20 x 30 tokens, far from the beginning of the row."""
    before = torch.arange(tokens).remainder(80).tolist()
    images = {"pixel_values": torch.randn(2400, 24, dtype=torch.float64), "image_grid_thw": torch.tensor([[1, 40, 60]])}
    return Rows([[*before, 92, *[IMAGE] * 600, 93, end] for end in (3, 4)], [images, dict(images)])


@pytest.mark.parametrize("family", GRID)
def test_a_corner_of_a_large_image(family: str) -> None:
    rows, model = large(), vision_model(family)
    forest = image_forest(model, rows.sequences, rows.images)
    assert forest.images is not None
    for sequence, images in zip(forest.sequences, forest.images, strict=True):
        assert len(sequence) <= 32 + 64 + 8
        assert images is None or len(row_units(model, images, [sequence.count(IMAGE)])) == 1
    assert forest.sequences[0].count(IMAGE) == 64 and forest.sequences[0][31] == 92


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "mistral3"])
def test_a_small_image_as_it_is(family: str) -> None:
    rows, model = rows_of(family, SCENARIOS["two"]), vision_model(family)
    forest = image_forest(model, rows.sequences, rows.images)
    end = rows.sequences[0].index(3)  # text behind the first image
    assert forest.sequences[0][: end - 1] == rows.sequences[0][: end - 1]


def test_a_wrong_tree_is_found_on_a_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = large(), vision_model("qwen2_5_vl")
    dta_plugin.sequence_logprobs(model, rows.sequences, images=rows.images)
    assert "probed packed and streamed on images" in str(latest_outcome(model))
    monkeypatch.setattr(batch_images, "has_own_positions", lambda _: False)
    with pytest.raises(UnsupportedError, match="differs from the model's own forward"):
        dta_plugin.sequence_logprobs(vision_model("qwen2_5_vl"), rows.sequences, TreeConfig(), images=rows.images)
