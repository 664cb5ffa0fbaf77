"""Padded batches with images, whatever trainer makes them: values at real tokens and all gradients are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.vision import batch_images, forward
from tests.support.vision_images import IMAGE, over_images
from tests.support.vision_models import FAMILIES, SCENARIOS, rows_of, vision_model
from tests.support.widened import widened

EXACT, NOTICED = 1e-11, 1e-2
UNPROBED = TreeConfig(probe="off")
KINDS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}


def padded(family: str, scenario: str, side: str = "left") -> dict[str, torch.Tensor]:
    """As a trainer's collator would make it."""
    rows = rows_of(family, SCENARIOS[scenario])
    ids = torch.zeros(len(rows.sequences), max(map(len, rows.sequences)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows.sequences):
        place = slice(-len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    images = over_images([images for images in rows.images if images is not None])
    name = KINDS.get(family, "mm_token_type_ids" if FAMILIES[family][1] == "grid" else None)
    kinds = {} if name is None else {name: ids.eq(IMAGE).long()}
    return {"input_ids": ids, "attention_mask": mask, **kinds, **images}


def step(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of real tokens, and all gradients of a function of them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with widened():
        log_p = model(**batch, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
        values = log_p.gather(2, ids[:, 1:, None])[..., 0][(mask[:, 1:] * mask[:, :-1]).bool()]
        model.zero_grad()
        (torch.tanh(values) * torch.arange(1, len(values) + 1) / len(values)).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return values.detach(), gradients


def apart(family: str, batch: dict[str, torch.Tensor], config: TreeConfig = UNPROBED) -> tuple[float, Any]:
    """How far shared values and gradients are from the model's own, and the handle."""
    model = vision_model(family)
    values, gradients = step(vision_model(family), batch)
    handle = dta_plugin.share_prefixes(model, config)
    shared, found = step(model, batch)
    handle.remove()
    worst = max((found[name] - gradients[name]).norm().item() for name in gradients)
    return max(worst, (shared - values).abs().max().item()), handle


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scenario", ["two", "in some branches", "repeated"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "internvl", "mistral3"])
def test_equal(family: str, scenario: str, side: str) -> None:
    worst, handle = apart(family, padded(family, scenario, side))
    assert worst < EXACT
    assert handle.report is not None and handle.report.tree.compression_ratio > 1.3


def test_probed_on_an_image_first() -> None:
    worst, handle = apart("qwen3_vl", padded("qwen3_vl", "two"), TreeConfig())
    assert worst < EXACT and handle.shared_calls == 1


def test_what_the_probe_finds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_images, "has_own_positions", lambda _: False)
    with pytest.raises(UnsupportedError, match="differs from the model's own forward"):
        apart("qwen3_vl", padded("qwen3_vl", "two"), TreeConfig())


def test_positions_of_text_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    monkeypatch.setattr(batch_images, "has_own_positions", lambda _: False)
    assert apart("qwen3_vl", padded("qwen3_vl", "two"))[0] > NOTICED


def test_features_left_out_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what goes into the first layers again."""
    own = forward._parts
    monkeypatch.setattr(forward, "_parts", lambda output: (own(output)[0], []))
    assert apart("qwen3_vl", padded("qwen3_vl", "two"))[0] > NOTICED


def test_text_alone() -> None:
    batch = padded("qwen3_vl", "two")
    text = {"input_ids": batch["input_ids"].clamp(max=80), "attention_mask": batch["attention_mask"]}
    worst, handle = apart("qwen3_vl", text)
    assert worst < EXACT and handle.shared_calls == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "gemma4"])
def test_text_alone_of_which_kinds_are_told(family: str) -> None:
    """As processors do: 0 for every token."""
    batch = padded(family, "two")
    ids = batch["input_ids"].clamp(max=80)
    name = KINDS.get(family, "mm_token_type_ids")
    text = {"input_ids": ids, "attention_mask": batch["attention_mask"], name: torch.zeros_like(ids)}
    worst, handle = apart(family, text)
    assert worst < EXACT and handle.shared_calls == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_kinds_that_ids_do_not_tell(family: str) -> None:
    """The model goes by them: it takes its own path."""
    batch = padded(family, "two")
    name = KINDS.get(family, "mm_token_type_ids")
    text = {"input_ids": batch["input_ids"].clamp(max=80), "attention_mask": batch["attention_mask"]}
    text[name] = batch[name] * 0
    text[name][:, -3] = 1
    handle = apart(family, text)[1]
    assert handle.shared_calls == 0 and f"may differ by row or token, {name}" in handle.reason


def test_rows_that_are_no_tree() -> None:
    """Images side by side, in a model that attends both ways within a run of placeholders."""
    pair = [images for images in rows_of("gemma3", [[0], [4]]).images if images is not None]
    ids = torch.tensor([[1, *[IMAGE] * 8, 3], [1, *[IMAGE] * 8, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids.eq(IMAGE).long()}
    batch |= over_images([*pair, *pair])
    with pytest.raises(UnsupportedError, match="images without a token between them"):
        apart("gemma3", batch)
    worst, handle = apart("gemma3", batch, TreeConfig(probe="off", on_unsupported="dense"))
    assert worst == 0 and handle.shared_calls == 0 and "images without a token between them" in handle.reason


def test_an_image_too_few() -> None:
    batch = padded("qwen3_vl", "one")
    batch["image_grid_thw"] = batch["image_grid_thw"][:-1]
    batch["pixel_values"] = batch["pixel_values"][:-16]
    model = vision_model("qwen3_vl")
    with dta_plugin.share_prefixes(model, UNPROBED), pytest.raises(InvalidInputError, match="image tokens"):
        model(**batch, use_cache=False)
