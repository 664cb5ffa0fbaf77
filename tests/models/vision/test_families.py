"""Every family with images, against the unmodified model, one sequence at a time: log-probs and all gradients.

In float64 without the float32 islands of modeling files, packed and in chunks, each tree shape that images make.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from dta_plugin import TreeConfig
from dta_plugin.models.vision import batch_images
from dta_plugin.models.vision.batch_images import BatchImages
from tests.support.oracle import Result, dense, difference
from tests.support.tree_run import through_tree
from tests.support.vision_models import FAMILIES, SCENARIOS, rows_of, vision_model
from tests.support.widened import widened

pytestmark = pytest.mark.usefixtures("unprobed")

# Families whose language model asks for more than attention; a quick and a slow selection.
QUICK = ("qwen3_vl", "qwen3_5", "gemma4")
BUDGETS = (None, 1, 7)  # None: packed
EXACT, FLOAT32, NOTICED = 1e-10, 3e-5, 1e-2


@cache
def model_of(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(for the oracle, for the tree)."""
    return vision_model(family, dtype), vision_model(family, dtype)


@cache
def expected(family: str, scenario: str, dtype: torch.dtype) -> Result:
    rows, model = rows_of(family, SCENARIOS[scenario], dtype), model_of(family, dtype)[0]
    with widened():
        return dense(model, rows.sequences, more=rows.dense_inputs(model))


def along(family: str, scenario: str, dtype: torch.dtype, budget: int | None = None) -> Result:
    rows, executor = rows_of(family, SCENARIOS[scenario], dtype), "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    with widened():
        return through_tree(
            model_of(family, dtype)[1], rows.sequences, config=config, executor=executor, images=rows.images
        )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_exact(family: str, scenario: str, budget: int | None) -> None:
    found = difference(along(family, scenario, torch.float64, budget), expected(family, scenario, torch.float64))
    assert found.worst < EXACT, found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in QUICK])
def test_exact_in_one_tree(family: str) -> None:
    for budget in (None, 7):
        found = difference(
            along(family, "in some branches", torch.float64, budget),
            expected(family, "in some branches", torch.float64),
        )
        assert found.worst < EXACT, found


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str) -> None:
    rows = rows_of(family, SCENARIOS["two"], torch.float32)
    oracle, model = model_of(family, torch.float32)
    truth = dense(oracle, rows.sequences, more=rows.dense_inputs(oracle))
    found = difference(through_tree(model, rows.sequences, images=rows.images), truth)
    assert found.worst < FLOAT32, found


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_alone_are_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: siblings of one text and different images, merged by ids."""
    monkeypatch.setattr(BatchImages, "identities", lambda images: images.ids)
    monkeypatch.setattr(batch_images, "has_own_positions", lambda _: False)
    apart = difference(along(family, "same text", torch.float64), expected(family, "same text", torch.float64))
    assert apart.logprobs > NOTICED and apart.gradients > NOTICED


@pytest.mark.parametrize("family", [name for name, (_, form) in FAMILIES.items() if form == "grid"])
def test_depths_for_positions_are_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: positions that count tokens, where the model's own count rows and columns of images."""
    monkeypatch.setattr(batch_images, "has_own_positions", lambda _: False)
    apart = difference(along(family, "two", torch.float64), expected(family, "two", torch.float64))
    assert apart.logprobs > NOTICED and apart.gradients > NOTICED


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_causal_mask_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: tokens of an image that see only those before them."""
    monkeypatch.setattr(batch_images, "block_rules", lambda _: {})
    apart = difference(along(family, "one", torch.float64), expected(family, "one", torch.float64))
    assert apart.logprobs > NOTICED and apart.gradients > NOTICED


def test_a_lost_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: of an image that a tree holds twice, the gradients of one copy alone."""
    own = batch_images.TreeImages.places

    def once(images: batch_images.TreeImages, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, rows = own(images, device)
        seen = torch.tensor([row in rows[:index].tolist() for index, row in enumerate(rows.tolist())])
        return tokens[~seen], rows[~seen]

    monkeypatch.setattr(batch_images.TreeImages, "places", once)
    apart = difference(along("mistral3", "repeated", torch.float64), expected("mistral3", "repeated", torch.float64))
    assert apart.worst > NOTICED


def test_the_tower_sees_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where it takes patches: those of distinct images, in one call, packed."""
    family = "qwen3_vl"
    tower, seen = model_of(family, torch.float64)[1].model.visual, []
    handle = tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        along(family, "repeated", torch.float64)
        assert seen == [16 + 16]  # images 0 and 4, of 4 x 4 patches
        seen.clear()
        along(family, "repeated", torch.float64, budget=7)
        assert seen == [32, 32]  # again for the backward pass
    finally:
        handle.remove()
