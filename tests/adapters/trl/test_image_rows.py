"""Rows with images as their placeholders have them: where they are cut, and which ones show the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dta_plugin import InvalidInputError, sequence_logprobs
from dta_plugin.adapters.trl.image_rows import image_rows
from dta_plugin.adapters.trl.images import RowImages, are_the_same, row_images
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared, joined, joined_images
from dta_plugin.adapters.trl.regroup import regroup
from dta_plugin.adapters.trl.token_weights import reweighted
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.models.vision.units import runs_of
from dta_plugin.training.image_rows import ImageRows
from tests.adapters.trl.vision import buffered
from tests.support.vision_images import IMAGE
from tests.support.vision_models import rows_of, vision_model


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "mistral3", "gemma3", "gemma4"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return vision_model(request.param)


# Two images in the prompt, text, an image of a tool, text.
ROW: list[Any] = [[5], 1, [6], 2, [7, 8], 3, [9, 10]]
TEXT: list[Any] = [[5], [6], [7], [8], [9]]


def shown(images: RowImages) -> int:
    if images is None:
        return 0
    return len(images["image_grid_thw"] if "image_grid_thw" in images else images["pixel_values"])


def test_rows_are_cut_between_images(model: PreTrainedModel) -> None:
    """Whatever the last token that is read: images that begin later are gone, one that has begun is whole."""
    inputs = buffered(model, [ROW, TEXT], 4)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    (row,), (whole,) = rows_of(model.config.model_type, [ROW]).sequences, rows_of(model.config.model_type, [ROW]).images
    places = [i for i, token in enumerate(row) if token == IMAGE]
    rows = image_rows(model, inputs, ids)
    assert rows is not None and [sum(runs) for runs in rows.runs] == [len(places), 0]
    seen = set()
    for end in range(1, len(row) + 1):
        (stop, text_stop), (own, of_text) = rows.up_to([np.array(row), np.arange(5)], [end, 1])
        assert (text_stop, of_text) == (1, None)
        count = shown(own)
        seen.add(count)
        assert stop >= end and (stop == end or row[stop - 1] == IMAGE)
        tokens = sum(token == IMAGE for token in row[:stop])
        expected = rows_of(model.config.model_type, [ROW[: 2 * count]])
        assert tokens == expected.sequences[0].count(IMAGE)
        if own is not None and count == 3:
            assert are_the_same([own], [whole])
        elif own is not None:
            assert are_the_same([own], [expected.images[0]])
    assert seen == {0, 1, 2, 3}


@torch.no_grad()
def test_cut_rows_have_the_log_probs_of_whole_ones(model: PreTrainedModel) -> None:
    """Up to where they were to end; and without the image that is cut off, they would not."""
    (row,), (images,) = (getattr(rows_of(model.config.model_type, [ROW]), name) for name in ("sequences", "images"))
    whole = sequence_logprobs(model, [row], images=[images]).logprobs[0]
    rows = ImageRows([images], [runs_of(np.array(row) == IMAGE)], model)
    for end in range(2, len(row), 3):
        (stop,), own = rows.up_to([np.array(row)], [end])
        found = sequence_logprobs(model, [row[:stop]], images=own).logprobs[0]
        assert (found[: end - 1] - whole[: end - 1]).abs().max() <= 1e-10
    last = len(row) - 1 - row[::-1].index(IMAGE)
    blank = None if images is None else images | {"pixel_values": images["pixel_values"] * 0}
    wrong = sequence_logprobs(model, [row], images=[blank]).logprobs[0]
    assert (wrong[last:] - whole[last:]).abs().max() > 1e-3


def test_a_mask_within_an_image(model: PreTrainedModel) -> None:
    inputs = buffered(model, [ROW], 4)
    hidden = inputs["completion_mask"].clone()
    hidden[0, 4:] = 0
    with pytest.raises(InvalidInputError, match=r"hides \d tokens of an image whose others it shows"):
        MicroBatch.from_inputs(inputs | {"completion_mask": hidden}, model)
    before = hidden.clone()
    before[0, 2:] = 0
    images = MicroBatch.from_inputs(inputs | {"completion_mask": before}, model).images
    assert images is not None and shown(images[0]) == 2


def test_weighted_rows_lose_images_that_they_do_not_reach(model: PreTrainedModel) -> None:
    inputs = buffered(model, [ROW, ROW, TEXT, ROW], 4)
    weights = inputs["completion_mask"].float()
    weights[0, 1:] = 0  # before the tool's image
    weights[1] = 0  # nothing is read
    weights[3, 4:] = 0  # within the image
    batch = MicroBatch.from_inputs(reweighted(inputs, weights), model)
    assert batch.images is not None and list(map(shown, batch.images)) == [2, 0, 0, 3]
    row = rows_of(model.config.model_type, [ROW]).sequences[0]
    last = max(i for i, token in enumerate(row) if token == IMAGE)
    first = len(rows_of(model.config.model_type, [ROW[:4]]).sequences[0])
    assert [len(sequence) for sequence in batch.rows.sequences] == [first + 1, 1, 5, last + 1]
    assert batch.scored_values([torch.ones(len(row) - 1) for row in batch.rows.sequences]).shape == (6,)
    assert bool(batch.runs[:, :-1].any(dim=0).all()), "a dense model sees all placeholders"


def test_siblings_meet_by_what_their_images_show(model: PreTrainedModel) -> None:
    """Two prompts of the same text with different images of one size: ids alone would not tell them apart."""
    one, other = [[5], 1, [6, 7]], [[5], 5, [6, 7]]
    rows = [[*(one if i % 2 else other), [8 + i]] for i in range(8)]
    batches = [buffered(model, rows[:4], 3), buffered(model, rows[4:], 3)]
    for number, batch in enumerate(batches):
        batch["advantages"] += 4 * number - 1
    after = regroup(batches, 2, TYPICAL, model)
    parity = [{int(n) % 2 for n in batch["advantages"]} for batch in after]
    assert sorted(map(len, parity)) == [1, 1]
    both = [MicroBatch.from_inputs(batch, model) for batch in after]
    ids, content = joined(both).sequences, compared(both, model).sequences
    assert [len({tuple(row[:-1]) for row in found}) for found in (ids, content)] == [1, 2]
    for batch in after:
        for number, own in zip(batch["advantages"], row_images(batch) or [], strict=True):
            expected = rows_of(model.config.model_type, [rows[int(number)]]).images[0]
            assert are_the_same([own], [expected])
    assert len(joined_images(both) or []) == 8 and both[0].has_rows_of(both[0]) and not both[0].has_rows_of(both[1])
