"""Images of TRL's batches: which row they belong to, and that they stay with it wherever the row goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import utils

from dta_plugin import InvalidInputError
from dta_plugin.adapters.trl.generation_batch import Inputs, RowTable, row_obstacle
from dta_plugin.adapters.trl.images import are_the_same, entries_of_rows, input_obstacle, row_images
from dta_plugin.adapters.trl.token_weights import reweighted
from tests.support.vision_images import IMAGE

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
