"""What verl hands on of pictures: whose they are, where rows are cut, their positions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")
if Version(version("verl")) < Version("0.9"):
    pytest.skip("tried with verl 0.9", allow_module_level=True)

from tensordict import NonTensorStack, TensorDict
from transformers import AutoModelForImageTextToText, PreTrainedModel
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.adapters.verl_plugin.images import position_obstacle, row_images
from dta_plugin.adapters.verl_plugin.jagged import JaggedRows, set_weights
from dta_plugin.adapters.verl_plugin.micro_batches import as_planned, planner, set_plan
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.vision.batch_images import BatchImages
from tests.adapters.verl.agent_loop import image, row
from tests.adapters.verl.pictures import KINDS, picture, pictures, save_vision, shown
from tests.adapters.verl.support import END, PLACE, START, Setup, Step, build, log_probs, mini_batch, nested, text_run

PICTURES = Step(shape="pictures", position_rows=4)


@pytest.fixture(scope="module")
def engine(rank: None, tmp_path_factory: pytest.TempPathFactory) -> TreeEngine:
    return build(Setup(), save_vision(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl"), tree=True)


@pytest.fixture(scope="module")
def model(engine: TreeEngine) -> PreTrainedModel:
    return causal_lm(engine.module)


def _with_inputs(change: Callable[[int, dict[str, Any]], Any]) -> TensorDict:
    data = mini_batch(PICTURES)
    rows = [change(index, dict(inputs)) for index, inputs in enumerate(data["multi_modal_inputs"])]
    data["multi_modal_inputs"] = NonTensorStack(*rows)
    return data


def test_rows_have_what_the_processor_returned(rank: None) -> None:
    """Without verl's own entry, what ids say already, and what is None."""
    kinds = {"mm_token_type_ids": torch.zeros(1, 5), "pixel_values_videos": None}
    data = _with_inputs(lambda index, inputs: inputs | kinds)
    found, expected = row_images(data), pictures()[2]
    assert found is not None
    for own, given in zip(found, expected, strict=True):
        if not given:
            assert own is None
            continue
        assert own is not None and set(own) == {"pixel_values", "image_grid_thw"}
        assert all(torch.equal(own[name], given[name]) for name in own)
    assert row_images(_with_inputs(lambda *_: kinds)) is None
    assert row_images(_with_inputs(lambda *_: None)) is None
    assert row_images(mini_batch(Step())) is None
    del data["multi_modal_inputs"]
    assert row_images(data) is None


def test_micro_batches_keep_the_pictures_of_rows(rank: None) -> None:
    data, given = mini_batch(PICTURES), pictures()[2]
    set_plan(data, [[5, 0], [3], [11, 7, 2]])
    micro_batches, plan = as_planned(lambda _: None)(data)
    for micro_batch, indices in zip(micro_batches, plan, strict=True):
        rows = row_images(micro_batch) or [None] * len(indices)
        for own, index in zip(rows, indices, strict=True):
            assert (own is None) == (not given[index])
            assert own is None or torch.equal(own["pixel_values"], given[index]["pixel_values"])


def test_the_same_text_with_other_pictures_is_not_shared(model: PreTrainedModel) -> None:
    """A budget of tree tokens counts both."""
    data = mini_batch(Step(shape="pictures", position_rows=4, budget=200))
    rows = JaggedRows.whole(data)
    assert rows.images is not None
    by_content = BatchImages.from_rows(model, rows.runs.sequences, rows.images).identities()
    tokens = [_tree_tokens(sequences) for sequences in (rows.runs.sequences, by_content)]
    assert tokens[0] < tokens[1]
    tu.assign_non_tensor(data, max_token_len_per_gpu=tokens[0])
    assert [planner(data, rows, TYPICAL).count for rows in (rows.runs.sequences, by_content)] == [1, 2]
    prompts = [row.tobytes() for row in rows.runs.sequences]
    assert len(set(rows.by_content(model).groups)) > len(set(rows.runs.groups))
    assert prompts == [row.tobytes() for row in rows.runs.sequences]  # ids stay


def _tree_tokens(sequences: list[np.ndarray]) -> int:
    beginnings = {row[:end].tobytes() for row in sequences for end in range(1, len(row) + 1)}
    return len(beginnings)


@pytest.mark.parametrize("last", ["before", "inside", "after"])
def test_rows_end_with_the_last_token_that_is_read(last: str, model: PreTrainedModel) -> None:
    """A picture that begins later is left out, one that has begun is whole."""
    data, (sequences, begins, given) = mini_batch(PICTURES), pictures()
    late = next(row for row in range(len(sequences)) if PLACE in sequences[row][begins[row] :])
    first = sequences[late].index(PLACE, begins[late])
    count = sequences[late][first:].count(PLACE)
    read = {"before": first - 2, "inside": first + 1, "after": first + count + 1}[last]
    weights = torch.zeros(len(sequences), max(len(row) - begin for row, begin in zip(sequences, begins, strict=True)))
    weights[late, read - begins[late]] = 1
    data["old_log_probs"] = nested([torch.zeros_like(row) for row in data["advantages"].unbind()])
    set_weights(data, weights)
    rows = JaggedRows.from_data(data, model)
    assert rows.images is not None and rows.runs.masks is not None
    end = {"before": read + 1, "inside": first + count, "after": read + 1}[last]
    assert rows.runs.sequences[late].tolist() == sequences[late][:end]
    assert rows.runs.masks[late].nonzero()[0].tolist() == [read]
    kept, all_of = rows.images[late], given[late]
    assert kept is not None
    assert len(kept["image_grid_thw"]) == (1 if last == "before" else 2)
    assert torch.equal(kept["pixel_values"], all_of["pixel_values"][: len(kept["pixel_values"])])
    others = [row for row in range(len(sequences)) if row != late]
    assert all(len(rows.runs.sequences[row]) == 1 and rows.images[row] is None for row in others)
    BatchImages.from_rows(model, rows.runs.sequences, rows.images)  # they fit each other


def _with_positions(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> TensorDict:
    data = mini_batch(PICTURES)
    rows = data["position_ids"].unbind()
    data["position_ids"] = nested([change(row) if i == index else row for i, row in enumerate(rows)])
    return data


def test_positions_are_the_models_own(model: PreTrainedModel) -> None:
    data = mini_batch(PICTURES)
    rows = JaggedRows.from_data(data, model)
    assert rows.images is not None
    images = BatchImages.from_rows(model, rows.runs.sequences, rows.images)
    assert position_obstacle(data, images) is None
    text = next(row for row, own in enumerate(rows.images) if own is None)
    shown_in = next(row for row, own in enumerate(rows.images) if own is not None)
    for axis in range(4):
        wrong = _with_positions(shown_in, lambda row, axis=axis: row + (torch.arange(4) == axis)[:, None])
        assert f"row {shown_in}, which has images" in (position_obstacle(wrong, images) or "")
        wrong = _with_positions(text, lambda row, axis=axis: row + (torch.arange(4) == axis)[:, None])
        assert f"row {text} are not 0, 1, 2" in (position_obstacle(wrong, images) or "")
    assert "not 0, 1, 2" in (position_obstacle(data, None) or "")
    lengths = data["input_ids"].offsets().diff().tolist()
    data["position_ids"] = nested([torch.arange(length) for length in lengths])
    assert "which has images" in (position_obstacle(data, images) or "")


@pytest.mark.parametrize("family", KINDS)
def test_rows_as_verls_agent_loop_makes_them(family: str, tmp_path: Path) -> None:
    """Positions by the function that verl binds to the processor, inputs with all that it adds and leaves."""
    model = AutoModelForImageTextToText.from_pretrained(save_vision(tmp_path, family))
    text = text_run(5, 0)
    found = [([*text, START, *[PLACE] * 6, END, *text], [image(0, 16, 24)]), (text, [])]
    found.append(([START, *[PLACE] * 4, END, *text, START, *[PLACE] * 6, END], [image(1), image(0, 24, 16)]))
    rows = [row(model, ids, shown_in) for ids, shown_in in found]
    assert {"images_seqlens"} < rows[0][0].keys()
    data = TensorDict({"input_ids": nested([torch.tensor(ids) for ids, _ in found])}, batch_size=[3])
    data["position_ids"] = nested([positions for _, positions in rows])
    data["multi_modal_inputs"] = NonTensorStack(*[inputs for inputs, _ in rows])
    images = row_images(data)
    assert images is not None and images[1] is None
    batch = BatchImages.from_rows(model, [ids for ids, _ in found], images)
    assert [len(own) for own in batch.units_of_row] == [1, 0, 2]
    assert position_obstacle(data, batch) is None


INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "videos": ({"pixel_values_videos": torch.zeros(1), "video_grid_thw": torch.zeros(1)}, "pixel_values_videos"),
    "sound": ({"input_features": torch.zeros(1)}, "input_features"),
    "unknown": ({"tiles_of_mine": torch.zeros(1)}, "tiles_of_mine"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_towers_of_images_do_not_take_is_refused_by_name(name: str, engine: TreeEngine) -> None:
    more, message = INPUTS[name]
    engine.configure(TreeConfig())
    with pytest.raises(UnsupportedError, match=message) as error:
        log_probs(engine, _with_inputs(lambda index, inputs: inputs | more if index == 1 else inputs))
    assert "custom.dta.on_unsupported=dense" in str(error.value)


@pytest.mark.parametrize("what", ["missing", "too many", "of another size"])
def test_pictures_that_do_not_fit_their_row(what: str, engine: TreeEngine) -> None:
    """verl's own path could not run it either, so there is none to fall back to."""
    changed = {"missing": {}, "too many": pictures()[2][2], "of another size": picture(0, width=8)}[what]
    engine.configure(TreeConfig(on_unsupported="dense"))
    data = _with_inputs(lambda index, inputs: changed if index == 0 else inputs)
    with pytest.raises(InvalidInputError, match="image tokens"):
        log_probs(engine, data)


def test_positions_that_are_others_are_refused(engine: TreeEngine) -> None:
    engine.configure(TreeConfig())
    with pytest.raises(UnsupportedError, match="get_rope_index"):
        log_probs(engine, _with_positions(0, lambda row: row[:1].expand(4, -1)))


def test_a_model_without_a_tower(folder: Path) -> None:
    engine = build(Setup(), folder, tree=True)
    data = mini_batch(Step())
    rows = [picture(0) | {"images_seqlens": torch.tensor([16])} for _ in range(len(data))]
    data["multi_modal_inputs"] = NonTensorStack(*rows)
    with pytest.raises(UnsupportedError, match="no image token in its config"):
        log_probs(engine, data)


def test_shown_is_as_long_as_its_features() -> None:
    assert shown(picture(0, width=6)).count(PLACE) == 6
