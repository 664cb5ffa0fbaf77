"""GRPO with the attention that people use on GPUs, and with continuous batching: equal to stock under the same name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOConfig, GRPOTrainer

from dta_plugin import TreeMask
from dta_plugin.models.attention_registry import uninstall
from tests.adapters.trl.support import TOLERANCE, assert_equal, dense_and_tree, difference, enabled, moved, train
from tests.support.flash import IMPLEMENTATIONS, flash_attention
from tests.support.tree_run import make_siblings_visible

CONTINUOUS: dict[str, Any] = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 128, "block_size": 32},
}
can_batch_continuously = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.8") or Version(version("trl")) < Version("1.16"),
    reason="TRL 1.16 batches continuously with transformers 5.8 or newer",
)


@pytest.fixture(scope="module", autouse=True)
def flash() -> Iterator[list[str]]:
    with flash_attention() as calls:
        yield calls


def loaded(folder: str, attention: str, names: list[str]) -> Callable[[], PreTrainedModel]:
    """Loads the model, which appends its attention's name to `names` in every call."""

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        model.register_forward_pre_hook(lambda called, _: names.append(called.config._attn_implementation))
        return model

    return load


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_three_steps(attention: str, model: str, tmp_path: Path, flash: list[str]) -> None:
    names: list[str] = []
    flash.clear()
    dense, tree = dense_and_tree(loaded(model, attention, names), tmp_path)
    assert_equal(dense, tree)
    assert set(names) == {attention} and flash


@can_batch_continuously
@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "eager"])
def test_continuous_batching(attention: str, model: str, tmp_path: Path) -> None:
    names: list[str] = []
    dense, tree = dense_and_tree(
        loaded(model, attention, names), tmp_path, gradient_checkpointing=attention == "sdpa", **CONTINUOUS
    )
    assert_equal(dense, tree)
    assert not any("dta" in name for name in names) and attention in names


def test_the_flag_leaves_nothing_behind(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeMask, "alive", WeakSet())  # graphs that other tests have left alive do not count
    uninstall()
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with enabled():
        tree = train(loaded(model, "flash_attention_2", []), tmp_path, GRPOTrainer, GRPOConfig)
        gc.collect()
    assert moved(tree) > 1000 * TOLERANCE and tree.dta
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.usefixtures("unprobed")
def test_negative_control(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_siblings_visible(monkeypatch)
    dense, tree = dense_and_tree(loaded(model, "flash_attention_2", []), tmp_path)
    assert difference(dense, tree) > 100 * TOLERANCE
