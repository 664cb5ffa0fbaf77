"""GRPO and RLOO with images as trees: equal to stock TRL, with the tower called once per distinct image."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer
from dta_plugin.adapters.trl.images import VALUES
from dta_plugin.models.vision import batch_images
from tests.adapters.trl.image_ranks_script import half
from tests.adapters.trl.support import (
    TOLERANCE,
    assert_equal,
    build,
    dense_and_tree,
    difference,
    moved,
    no_dense_pass,
    train,
    weight_difference,
)
from tests.adapters.trl.test_regroup import EXTREMES, TOKEN_MEANS
from tests.adapters.trl.vision import Tools, TowerCalls, buffered, processor, questions, save_vision_model
from tests.support.vision_images import IMAGE
from tests.support.vision_models import vision_model

# One image per prompt, of which two have the same text and size; several; and none, which TRL takes if tools have some.
ONE = [[number] for number in range(4)] * 4
SEVERAL = [[0], [1, 2], [3], [2, 0, 4]] * 4
MIXED = [[0], [1, 2], [], [2, 0, 4]] * 4
LORA = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=r".*language_model.*\.(q_proj|down_proj)")
LORA_EVERYWHERE = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=r".*\.(q_proj|qkv|down_proj)")
# What the families' forwards take beside ids.
TYPES = {"gemma3": ("token_type_ids",), "gemma4": ("mm_token_type_ids",), "qwen2_vl": ("mm_token_type_ids",)}
SPREAD = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
APART = {"dta_merge_window": "never"}


def frozen_tower(trainer: Any) -> None:
    trainer.model.model.visual.requires_grad_(False)


def on(images: list[list[int]], texts: int = 2, **options: Any) -> dict[str, Any]:
    return {"train_dataset": questions(images, texts), "processing_class": processor(), **options}


CASES: dict[str, dict[str, Any]] = {
    "one": {"beta": 0.04, "trainer_options": on(ONE)},
    "same_text": {"trainer_options": on(ONE, texts=1)},
    "several": {"trainer_options": on(SEVERAL)},
    "frozen_tower": {"prepare": frozen_tower, "trainer_options": on(SEVERAL)},
    "two_iterations": {"num_iterations": 2, "max_steps": 4, "trainer_options": on(SEVERAL)},
    "merged": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "dta": {"dta_merge_window": "always"},
        "trainer_options": on(SEVERAL),
    },
    "checkpointing": {"gradient_checkpointing": True, "trainer_options": on(ONE)},
    "lora": {"beta": 0.04, "learning_rate": 0.03, "trainer_options": on(SEVERAL, peft_config=LORA)},
    "lora_everywhere": {"learning_rate": 0.03, "trainer_options": on(SEVERAL, peft_config=LORA_EVERYWHERE)},
    "streamed": {"dta": {"dta_max_tree_tokens_per_chunk": 40}, "trainer_options": on(SEVERAL)},
    "streamed_lora": {
        "learning_rate": 0.03,
        "gradient_checkpointing": True,
        "dta": {"dta_max_tree_tokens_per_chunk": 40},
        "trainer_options": on(SEVERAL, peft_config=LORA_EVERYWHERE),
    },
    "verified": {"dta": {"dta_verify": "first"}, "trainer_options": on(SEVERAL)},
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.mark.parametrize("name", CASES)
def test_equals_stock(vision: str, tmp_path: Path, name: str) -> None:
    assert_equal(*dense_and_tree(vision, tmp_path, **CASES[name]))


def test_features_for_several_layers(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model = save_vision_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")
    assert_equal(*dense_and_tree(model, tmp_path, trainer_options=on(SEVERAL)))


def test_rloo(vision: str, tmp_path: Path) -> None:
    trainers, configs = (RLOOTrainer, TreeRLOOTrainer), (RLOOConfig, TreeRLOOConfig)
    assert_equal(*dense_and_tree(vision, tmp_path, trainers, configs, beta=0.04, trainer_options=on(SEVERAL)))


ROWS: list[list[Any]] = [
    [[5], 1, [6, 7], [8, 9]],
    [[5], 1, [6, 7], [8], 2, [9]],
    [[5], 2, [6, 7], [8, 9]],
    [[4], 1, 3, [10]],
]


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "internvl", "mistral3", "qwen2_vl"])
def test_every_form_of_images(family: str, tmp_path: Path) -> None:
    """TRL's hook and the tree, on the same rows: log-probs, entropies, and gradients of all weights."""
    found = []
    for kind, config in ((GRPOTrainer, GRPOConfig), (TreeGRPOTrainer, TreeGRPOConfig)):
        trainer = build(lambda: vision_model(family, torch.float32), tmp_path, kind, config, on(ONE))
        trainer.model.train()
        inputs = buffered(trainer.model, ROWS, 3)
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        images = {name: inputs[name] for name in (*VALUES, "num_images") if name in inputs}
        images |= {name: (ids == IMAGE).long() for name in TYPES.get(family, ())}
        images["pixel_values"] = images["pixel_values"].float()
        columns = inputs["completion_ids"].shape[1]
        with no_dense_pass(GRPOTrainer) if kind is TreeGRPOTrainer else nullcontext():
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, columns, compute_entropy=True, **images
            )
        (logps * inputs["completion_mask"] * torch.arange(1, columns + 1)).sum().backward()
        found.append(
            [
                logps.detach() * inputs["completion_mask"],
                entropies.detach() * inputs["completion_mask"],
                *(p.grad for p in trainer.model.parameters() if p.grad is not None),
            ]
        )
    assert len(found[0]) == len(found[1])
    assert any(
        "vision" in name or "visual" in name for name, p in trainer.model.named_parameters() if p.grad is not None
    )
    for stock, tree in zip(*found, strict=True):
        assert (stock - tree).norm() <= 1e-4 * stock.norm() + 1e-5


@pytest.mark.parametrize("images", [ONE, SEVERAL], ids=["one", "several"])
def test_siblings_and_their_images_move_together(vision: str, tmp_path: Path, images: list[list[int]]) -> None:
    """Micro-batches are dealt out anew: stock's shuffled ones share less."""
    run = {"loss_type": "grpo", "trainer_options": on(images), **SPREAD}
    dense, tree = dense_and_tree(vision, tmp_path, dta=APART, **run)
    assert_equal(dense, tree, ignore=(*EXTREMES, *TOKEN_MEANS))
    apart = train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_regroup="never", **APART, **run)
    assert sum(e["dta/tree_tokens"] for e in tree.dta) < 0.9 * sum(e["dta/tree_tokens"] for e in apart.dta)


def test_tower_sees_each_image_once(vision: str, tmp_path: Path) -> None:
    """A micro-batch of 8 rows: two prompts, with one image of 16 or 24 patches each."""
    calls = [TowerCalls(), TowerCalls()]
    run = {"max_steps": 2, "trainer_options": on(ONE), "shuffle_dataset": False}
    train(vision, tmp_path, GRPOTrainer, GRPOConfig, calls[0].watch, **run)
    train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, calls[1].watch, **run)
    assert calls[0].images == [8, 8] and calls[0].patches == [4 * (16 + 24), 4 * (24 + 16)]
    assert calls[1].images == [2, 2] and calls[1].patches == [16 + 24, 24 + 16]


def test_negative_control_images_of_other_rows(vision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the same text whose images are taken for the same by their size."""

    def by_size(units: list[Any]) -> tuple[list[Any], list[int]]:
        found: dict[Any, int] = {}
        kinds = [found.setdefault(unit.inputs["pixel_values"].shape, len(found)) for unit in units]
        return [units[kinds.index(kind)] for kind in range(len(found))], kinds

    run = {"max_steps": 2, "trainer_options": on([[0], [3], [6], [9]] * 4, texts=1)}
    dense = train(vision, tmp_path, GRPOTrainer, GRPOConfig, **run)
    assert difference(dense, train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **run)) <= TOLERANCE
    monkeypatch.setattr(batch_images, "distinct_units", by_size)
    wrong = train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **run)
    assert difference(dense, wrong) > 1000 * TOLERANCE


def test_pruned_rows_take_their_images_along(vision: str, tmp_path: Path) -> None:
    """Rows of one prompt are all worth the same: nothing of them runs, their image neither."""
    tower = TowerCalls()
    run = {"trainer_options": on(ONE, reward_funcs=half), "shuffle_dataset": False}
    dense = train(vision, tmp_path, GRPOTrainer, GRPOConfig, **run)
    tree = train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, tower.watch, **run)
    assert_equal(dense, tree)
    assert set(tower.images) == {1}
    assert all(entry["dta/pruned_tokens"] > 4 * (9 + 4) for entry in tree.dta)


TOOL_CASES: dict[str, dict[str, Any]] = {
    "pruned": {},
    "whole": {"dta": {"dta_prune": "never"}},
    "merged": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dta": {"dta_merge_window": "always"},
    },
    "regrouped": {"loss_type": "grpo", "dta": APART, **SPREAD},
}


@pytest.mark.parametrize("name", TOOL_CASES)
def test_images_from_tools(vision: str, tmp_path: Path, name: str) -> None:
    """Every fourth row ends with an image that no token comes after: where rows are pruned, it is gone."""
    options = {"prepare": Tools(), "max_completion_length": 40, "trainer_options": on(MIXED), **TOOL_CASES[name]}
    ignore = (*EXTREMES, *TOKEN_MEANS) if name == "regrouped" else ()
    dense, tree = dense_and_tree(vision, tmp_path, **options)
    assert_equal(dense, tree, ignore)
    assert (name == "whole") == (not any(entry["dta/pruned_tokens"] for entry in tree.dta))


def test_truncated_images(vision: str, tmp_path: Path) -> None:
    """TRL drops all images of the batch, and placeholders are tokens like others."""
    tower = TowerCalls()

    def prepare(trainer: Any) -> None:
        Tools(cut=True)(trainer)
        tower.watch(trainer)

    options = {"prepare": prepare, "max_completion_length": 40, "trainer_options": on(MIXED)}
    assert_equal(*dense_and_tree(vision, tmp_path, **options))
    assert not tower.images


@pytest.mark.parametrize("tools", [False, True], ids=["prompts", "tools"])
def test_drawn_tokens(vision: str, tmp_path: Path, tools: bool) -> None:
    """The same drawing through the tree, and through the dense path that a gate falls back to."""
    options: dict[str, Any] = {
        "prepare": Tools() if tools else lambda trainer: None,
        "max_completion_length": 40 if tools else 9,
        "trainer_options": on(SEVERAL),
        "dta_token_selection": "rpc",
        "dta_token_budget": 0.5,
    }
    gate = {"dta_min_saving": 0.99}
    tree = train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **options)
    fallback = train(vision, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **options, **gate)
    assert all(entry["dta/dense_fallback"] == 1 for entry in fallback.dta)
    assert weight_difference(tree, fallback) <= TOLERANCE and moved(tree) > 1000 * TOLERANCE
