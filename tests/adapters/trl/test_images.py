"""Images of TRL's batches: which row they belong to, and that they stay with it wherever the row goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import utils

from dta_plugin import InvalidInputError, sequence_logprobs
from dta_plugin.adapters.trl.generation_batch import Inputs, RowTable, row_obstacle
from dta_plugin.adapters.trl.image_rows import ImageRows
from dta_plugin.adapters.trl.images import RowImages, are_the_same, entries_of_rows, input_obstacle, row_images
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared, joined, joined_images
from dta_plugin.adapters.trl.regroup import regroup
from dta_plugin.adapters.trl.token_weights import reweighted
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.models.vision.units import runs_of
from tests.support.vision_images import IMAGE
from tests.support.vision_models import rows_of, vision_model

C = 3  # completion tokens of a row; as many as the channels of an image, on purpose
COUNTS = {"one_each": [1] * 8, "several": [0, 1, 2, 3, 0, 2, 1, 1], "two_each": [2] * 8}


def pixels(row: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(row))


def grid(row: int, count: int) -> dict[str, torch.Tensor]:
    grids = [[1, 2 + 2 * (row % 2), 2 + 2 * image] for image in range(count)]
    patches = sum(2 * 2 * (1 + row % 2) * (1 + image) for image in range(count))
    return {
        "pixel_values": pixels(row, patches, 5),
        "image_grid_thw": torch.tensor(grids, dtype=torch.long).reshape(count, 3),
    }


def per_image(row: int, count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(row, count, 3, 4, 4)}


def sizes(row: int, count: int) -> dict[str, torch.Tensor]:
    return per_image(row, count) | {"image_sizes": torch.full((count, 2), row)}


def places(row: int, count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(row, count, 6, 5), "image_position_ids": torch.full((count, 6, 2), row)}


def tiles(row: int, count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(row, count + row % 3 if count else 0, 3, 4, 4)}


def shaped_tiles(row: int, count: int) -> dict[str, torch.Tensor]:
    own = tiles(row, count)["pixel_values"].flatten(1)
    mask, shapes = torch.full((len(own), 9), row), torch.full((len(own), 2), row)
    return {"pixel_values": own, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def padded(row: int, count: int) -> dict[str, torch.Tensor]:
    """One entry per row, whatever it shows."""
    return {"pixel_values": pixels(row, 1, 4, 3, 2, 2), "pixel_attention_mask": torch.full((1, 4, 2, 2), row)}


FORMS: dict[str, Callable[[int, int], dict[str, torch.Tensor]]] = {
    f.__name__: f for f in (grid, per_image, sizes, places, tiles, shaped_tiles, padded)
}


def generation_batch(form: str, counts: list[int]) -> tuple[Inputs, list[dict[str, torch.Tensor]]]:
    """What TRL buffers before it shuffles; `advantages` numbers the rows. And each row's own values of images."""
    rows = [FORMS[form](row, count) for row, count in enumerate(counts)]
    number = torch.arange(len(counts))
    whole: Inputs = {
        "prompt_ids": 5 + number[:, None] + torch.arange(2),
        "prompt_mask": torch.ones(len(counts), 2, dtype=torch.long),
        "completion_ids": 30 + number[:, None] + torch.arange(C),
        "completion_mask": torch.ones(len(counts), C, dtype=torch.long),
        "advantages": number.float(),
        "num_items_in_batch": torch.tensor(77),
        "mm_token_type_ids": number[:, None].expand(-1, 2 + C).clone(),
        **{key: torch.cat([row[key] for row in rows]) for key in rows[0]},
        "num_images": counts,
    }
    if "tiles" in form:
        whole["num_tiles"] = [len(row["pixel_values"]) for row in rows]
    return whole, rows


def micro_batches(form: str, counts: list[int], count: int) -> tuple[list[Inputs], list[dict[str, torch.Tensor]]]:
    """The same as TRL shuffles and cuts it."""
    whole, rows = generation_batch(form, counts)
    torch.manual_seed(3)
    split = utils.shuffle_sequence_dict(utils.split_pixel_values_by_grid(whole))
    return [utils.unsplit_pixel_values_by_grid(batch) for batch in utils.split_tensor_dict(split, count)], rows


def assert_rows_have_their_own(batch: Inputs, rows: list[dict[str, torch.Tensor]], counts: list[int]) -> None:
    images = row_images(batch) or [None] * len(batch["prompt_ids"])
    for number, own, count in zip(batch["advantages"], images, batch["num_images"], strict=True):
        assert count == counts[int(number)]
        assert are_the_same([own], [rows[int(number)] if count else None])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_images(form: str, counts: list[int]) -> None:
    buffer, rows = micro_batches(form, counts, 2)
    for batch in buffer:
        assert_rows_have_their_own(batch, rows, counts)
    table = RowTable.from_batches(buffer)
    for before, after in zip(buffer, table.batches(), strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4)).tolist()
    taken = table.taken(order).batches()
    assert [int(n) for batch in taken for n in batch["advantages"]] == table.per_row["advantages"][order].tolist()  # type: ignore[index, union-attr]
    for batch in taken:
        assert_rows_have_their_own(batch, rows, counts)
        assert torch.equal(batch["mm_token_type_ids"][:, 0], batch["advantages"].long())


def test_negative_control_images_that_look_like_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one image per row, grids have as many entries as rows, and pixels of all images are left behind."""
    buffer, rows = micro_batches("grid", COUNTS["one_each"], 2)
    monkeypatch.setattr("dta_plugin.adapters.trl.generation_batch.entries_of_rows", lambda batch: {})
    table = RowTable.from_batches(buffer)
    assert "image_grid_thw" in table.per_row and "pixel_values" in table.constant
    with pytest.raises((AssertionError, InvalidInputError)):
        for batch in table.taken(list(range(8))[::-1]).batches():
            assert_rows_have_their_own(batch, rows, COUNTS["one_each"])


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_what_trl_slices(form: str, counts: list[int], trainer_class: Any) -> None:
    """TRL's own hook, row by row, hands the model the same values."""
    (batch,), _ = micro_batches(form, counts, 1)
    calls: list[dict[str, Any]] = []

    def model(**inputs: Any) -> Any:
        calls.append(inputs)
        shape = inputs["input_ids"].shape
        return SimpleNamespace(log_probs=torch.zeros(shape), entropy=torch.zeros(shape), aux_loss=None)

    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    names = ("num_images", "num_tiles", "mm_token_type_ids", *entries_of_rows(batch))
    inputs = {name: batch[name] for name in names if name in batch}
    hook = trainer_class._get_per_token_logps_and_entropies.__wrapped__
    hook(trainer, model, ids, torch.ones_like(ids), C, batch_size=1, **inputs)
    images = row_images(batch)
    assert images is not None and len(calls) == 8
    for own, call, count in zip(images, calls, batch["num_images"], strict=True):
        assert (own is None) == (count == 0)
        for name, value in (own or {}).items():
            assert torch.equal(value, call[name]), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "videos": ({"pixel_values_videos": torch.ones(1)}, "the batch has pixel_values_videos, and"),
    "no_counts": ({"num_images": None}, "pixel_values without num_images"),
    "no_pixels": ({"pixel_values": None}, "image_grid_thw without pixel_values"),
    "types": ({"mm_token_type_ids": torch.ones(2, 4, dtype=torch.long)}, "mm_token_type_ids says of tokens what"),
    "shape": ({"token_type_ids": torch.zeros(2, 5, dtype=torch.long)}, "token_type_ids says of tokens what"),
}
IDS = torch.tensor([[0, 5, IMAGE, 7], [5, IMAGE, 7, 8]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
TYPES = (IDS == IMAGE).long()
GIVEN: dict[str, Any] = grid(0, 1) | {"mm_token_type_ids": TYPES, "num_images": [1, 0], "batch_size": 2}


def model_of(**config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_named(name: str) -> None:
    more, message = REFUSED[name]
    assert input_obstacle(model_of(image_token_id=IMAGE), GIVEN, IDS, MASK) is None
    assert message in str(input_obstacle(model_of(image_token_id=IMAGE), GIVEN | more, IDS, MASK))


def test_types_of_tokens_without_images() -> None:
    """TRL drops all images of a batch where those of one row were truncated; ids keep their placeholders."""
    model = model_of(image_token_index=IMAGE)
    assert input_obstacle(model, {"token_type_ids": torch.zeros_like(TYPES), "num_images": None}, IDS, MASK) is None
    assert "says of tokens" in str(input_obstacle(model, {"token_type_ids": TYPES}, IDS, MASK))
    assert "the batch has token_type_ids" in str(input_obstacle(model_of(), {"token_type_ids": TYPES * 0}, IDS, MASK))


@pytest.mark.parametrize("form", FORMS)
def test_entries_must_add_up(form: str) -> None:
    whole, _ = generation_batch(form, COUNTS["several"])
    key = "num_tiles" if "tiles" in form else "num_images"
    wrong = {key: [count + 1 for count in whole[key]]}
    if form in ("per_image", "padded"):  # one value alone: as many as rows, as images, or wrong
        wrong = {"pixel_values": whole["pixel_values"][:-1]}
    with pytest.raises(InvalidInputError, match="entries for 8 rows"):
        entries_of_rows(whole | wrong)


def test_values_beside_images_that_belong_to_no_row() -> None:
    buffer, _ = micro_batches("grid", COUNTS["several"], 2)
    assert row_obstacle(buffer) is None
    assert "of more, which is beside images" in str(row_obstacle([batch | {"more": torch.ones(3)} for batch in buffer]))
    assert row_obstacle([batch | {"more": torch.ones(4), "name": "x"} for batch in buffer]) is None
    assert "without num_images" in str(row_obstacle([batch | {"num_images": None} for batch in buffer]))
    text = [{"prompt_ids": torch.ones(4, 2), "more": torch.ones(3)}]
    assert row_obstacle(text) is None


@pytest.mark.parametrize("form", FORMS)
def test_weights_leave_images_alone(form: str) -> None:
    """Pixels are as wide as completions here; types of tokens get a balance, which is text."""
    (batch,), rows = micro_batches(form, COUNTS["one_each"], 1)
    batch["mm_token_type_ids"] += 1
    weights = torch.tensor([[1.0, 0.0, 0.0]] * 8)
    once = reweighted(batch, weights)
    for inputs in (once, reweighted(once, weights)):
        assert_rows_have_their_own(inputs, rows, COUNTS["one_each"])
        assert inputs["completion_ids"].shape == (8, C + 1), "a dense pass needs placeholders behind the last weight"
        assert torch.equal(inputs["mm_token_type_ids"][:, :-1], batch["mm_token_type_ids"])
        assert not inputs["mm_token_type_ids"][:, -1].any()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "mistral3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return vision_model(request.param)


def buffered(model: PreTrainedModel, parts: list[list[Any]], prompt: int) -> Inputs:
    """A micro-batch of these rows, of which the first `prompt` parts are the prompt; all tokens are read."""
    found = rows_of(model.config.model_type, parts)
    lengths = [len(rows_of(model.config.model_type, [row[:prompt]]).sequences[0]) for row in parts]
    prompts = [row[:n] for row, n in zip(found.sequences, lengths, strict=True)]
    completions = [row[n:] for row, n in zip(found.sequences, lengths, strict=True)]

    def pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        masks = [torch.ones_like(row) for row in tensors]
        side = "left" if left else "right"
        return utils.pad(tensors, 0, side), utils.pad(masks, 0, side)

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = pad(prompts, True), pad(completions, False)
    shown = [images for images in found.images if images is not None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.arange(1.0, len(parts) + 1),
        **_over_rows(shown),
        "num_images": [sum(isinstance(part, int) for part in row) for row in parts],
    }


def _over_rows(shown: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As a processor returns them for all rows: pixels padded to the largest."""
    most = torch.tensor([images["pixel_values"].shape[1:] for images in shown]).amax(dim=0).tolist()
    joined = {key: [images[key] for images in shown] for key in shown[0]}
    joined["pixel_values"] = [
        torch.nn.functional.pad(p, [n for a, b in zip(most[::-1], p.shape[:0:-1], strict=True) for n in (0, a - b)])
        for p in joined["pixel_values"]
    ]
    return {key: torch.cat(values) for key, values in joined.items()}


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
    rows = ImageRows.from_inputs(model, inputs, ids)
    assert rows is not None and [sum(runs) for runs in rows.runs] == [len(places), 0]
    seen = set()
    for end in range(1, len(row) + 1):
        (stop, text_stop), (own, of_text) = rows.up_to(
            [MicroBatch.from_inputs(inputs, model).rows.sequences[0]] * 2, [end, 1]
        )
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
            MicroBatch.from_inputs(inputs, model)
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
