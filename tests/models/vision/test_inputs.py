"""What is given for images and does not fit: said in words, and where asked for, run by the model's own path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig, UnsupportedError
from tests.support.models import tiny_model
from tests.support.oracle import dense, difference, result_of
from tests.support.vision_images import IMAGE, Rows, over_images
from tests.support.vision_models import SCENARIOS, rows_of, vision_model
from tests.support.widened import widened

FAMILY = "qwen3_vl"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": (
        {"pixel_values": torch.zeros(0, 24), "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)},
        r"pixel_values of a row's images is \(0, 24\). Expected an entry or more.*pass None",
    ),
    "no tensor": ({"image_grid_thw": [[1, 4, 4]]}, "image_grid_thw of a row's images is a list. Expected a tensor"),
    "one grid": ({"image_grid_thw": torch.tensor([1, 4, 4])}, r"is \(3,\). Expected \[images, 3\]"),
    "a gradient": ({"pixel_values": torch.zeros(16, 24, requires_grad=True)}, r"pass pixel_values.detach\(\)"),
}


@pytest.mark.parametrize("on_unsupported", ["error", "dense"])
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str, on_unsupported: str) -> None:
    rows, (given, message) = rows_of(FAMILY, SCENARIOS["one"]), BAD[name]
    assert rows.images[1] is not None
    rows.images[1] = rows.images[1] | given
    config = TreeConfig(on_unsupported=on_unsupported)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=message):
        dta_plugin.sequence_logprobs(vision_model(FAMILY), rows.sequences, config, images=rows.images)


def test_a_video() -> None:
    """A trainer's own path may run it, ours for single rows does not."""
    rows = rows_of(FAMILY, SCENARIOS["one"])
    assert rows.images[1] is not None
    rows.images[1] = rows.images[1] | {"pixel_values_videos": torch.zeros(16, 24)}
    with pytest.raises(UnsupportedError, match="videos and sound are not supported"):
        dta_plugin.sequence_logprobs(vision_model(FAMILY), rows.sequences, images=rows.images)
    config = TreeConfig(on_unsupported="dense")
    with pytest.raises(InvalidInputError, match=r"pixel_values_videos, which .* does not take for images"):
        dta_plugin.sequence_logprobs(vision_model(FAMILY), rows.sequences, config, images=rows.images)


def side_by_side(family: str) -> Rows:
    """Two images without text between them, in the last row."""
    rows, pair = rows_of(family, SCENARIOS["one"]), rows_of(family, [[0], [4]])
    found = [images for images in pair.images if images is not None]
    ids = [token for row in pair.sequences for token in row if token == IMAGE]
    return Rows([*rows.sequences, [1, *ids, 3]], [*rows.images, over_images(found)])


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_rows_that_are_no_tree(family: str) -> None:
    rows, model = side_by_side(family), vision_model(family)
    with pytest.raises(UnsupportedError, match="Row 3 has images without a token between them"):
        dta_plugin.sequence_logprobs(model, rows.sequences, images=rows.images)
    oracle = vision_model(family)
    with widened():
        config = TreeConfig(on_unsupported="dense")
        out = dta_plugin.sequence_logprobs(model, rows.sequences, config, 1.0, True, images=rows.images)
        assert out.entropies is not None and out.report.executor == "dense"
        assert "without a token between them" in out.report.reason
        found = result_of(model, out.logprobs, out.entropies)
        truth = dense(oracle, rows.sequences, more=rows.dense_inputs(oracle))
    assert difference(found, truth).worst < 1e-12


def test_a_model_of_text() -> None:
    """Its own forward would pass over images without a word."""
    rows, model = rows_of(FAMILY, SCENARIOS["one"]), tiny_model("qwen2", torch.float64)
    with pytest.raises(UnsupportedError, match="Qwen2ForCausalLM has no image token"):
        dta_plugin.sequence_logprobs(model, rows.sequences, images=rows.images)
    config = TreeConfig(on_unsupported="dense")
    with pytest.raises(InvalidInputError, match="pixel_values, which Qwen2ForCausalLM does not take"):
        dta_plugin.sequence_logprobs(model, rows.sequences, config, images=rows.images)
