"""Rows with pictures through verl's engine, stock and with the plugin: numbers, log-probs and weights of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")
if Version(version("verl")) < Version("0.9"):
    pytest.skip("tried with verl 0.9", allow_module_level=True)

from transformers.models.qwen3_5 import modeling_qwen3_5

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution import packed
from dta_plugin.models.vision.batch_images import BatchImages
from tests.adapters.verl.pictures import KINDS, expected_of, save_vision, weights
from tests.adapters.verl.recurrent import rule_that_takes_no_rows
from tests.adapters.verl.support import Setup, Step, actor_config, build, difference, train
from tests.adapters.verl.updates import relative, sampled, updated, without_regularisers
from tests.support.tree_run import make_siblings_visible

pytestmark = pytest.mark.usefixtures("not_replaced")
TOLERANCE = 1e-5
# verl's own path for Qwen2-VL and Qwen2.5-VL wants a picture in every micro-batch.
PADDED = Step(shape="pictures", position_rows=4, remove_padding=False, budget=500)
PACKED = replace(PADDED, remove_padding=True, budget=60, stock_budget=500, temperature=None)
STATIC = replace(PADDED, dynamic=False, rows=6)
PADDED_ONLY = {"use_remove_padding": False}


@pytest.fixture(scope="module")
def folders(rank: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_vision(tmp_path_factory.mktemp(family), family) for family in KINDS}


@pytest.fixture(autouse=True)
def _rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own path is exact for packed rows of Qwen3.5, as it is with kernels."""
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule_that_takes_no_rows)


def _steps(setup: Setup, steps: Sequence[Step], folder: Path, tree: bool) -> tuple[list[dict[str, Any]], torch.Tensor]:
    engine = build(setup, folder, tree)
    before = weights(engine)
    results = train(engine, steps)
    after = weights(engine)
    assert (after - before).abs().max() > 30 * TOLERANCE  # of a learning rate of 1e-3
    return results, after


def _check(setup: Setup, steps: Sequence[Step], folder: Path) -> None:
    expected, stock = _steps(setup, steps, folder, tree=False)
    found, ours = _steps(setup, steps, folder, tree=True)
    worst = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(worst) < TOLERANCE, worst
    assert (ours - stock).abs().max() < TOLERANCE
    for step in found:
        assert step["dta"]["dta/dense_fallback"] == 0
        assert step["dta"]["dta/compression_ratio"] > 1.2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_every_step_is_equal(family: str, lora: bool, folders: dict[str, Path]) -> None:
    """Checkpointed. Prompts of the same text with different pictures, text among them, pictures in later turns."""
    _check(Setup("fsdp" if lora else "fsdp2", lora=lora), [PACKED, STATIC], folders[family])


@pytest.mark.parametrize("family,strategy", [("qwen2_5_vl", "fsdp"), ("qwen2_5_vl", "fsdp2"), ("qwen2_vl", "fsdp2")])
def test_older_families_with_padding(family: str, strategy: str, folders: dict[str, Path]) -> None:
    """verl's own forwards of the model, but not of attention."""
    _check(Setup(strategy, model=PADDED_ONLY), [PADDED, STATIC], folders[family])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_older_families_without_padding(family: str, lora: bool, folders: dict[str, Path]) -> None:
    """Without flash-attn, verl's own path cannot run this: compared is its engine with transformers' forwards."""
    setup, steps = Setup("fsdp2" if lora else "fsdp", lora=lora), [PACKED, PADDED]
    expected = expected_of(setup, steps, folders[family])
    found = train(build(setup, folders[family], tree=True), steps)
    worst = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(worst) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_further_steps(family: str, strategy: str, lora: bool, checkpointing: bool, folders: dict[str, Path]) -> None:
    setup = Setup(strategy, lora=lora, checkpointing=checkpointing)
    _check(setup, [PACKED, STATIC, PADDED, Step(position_rows=4)], folders[family])


def test_what_is_not_read_does_not_run(folders: dict[str, Path]) -> None:
    """Pictures of later turns, too, behind the last token that is read; and with a drawing of tokens."""
    engine = build(Setup(), folders["qwen3_vl"], tree=True)
    data = sampled(engine, replace(PADDED, extra={"calculate_entropy": False}))
    advantages = [row.clone() for row in data["advantages"].unbind()]
    for row in advantages[::2]:
        row[2:] = 0
    data["advantages"] = torch.nested.as_nested_tensor(advantages, layout=torch.jagged)
    actor = without_regularisers(actor_config(Step()))
    full, pruned = (updated(engine, data, TreeConfig(prune=prune), actor) for prune in ("never", "always"))
    assert relative(pruned.gradient, full.gradient) < TOLERANCE
    assert pruned.metrics["dta/pruned_tokens"] > 20 > full.metrics["dta/pruned_tokens"] == 0
    drawn = updated(engine, data, TreeConfig(token_selection="rpc", token_budget=0.3), actor)
    assert drawn.metrics["dta/pruned_tokens"] > 20 and drawn.gradient.any()


def test_verified_and_measured(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    engine = build(Setup(), folders["qwen3_vl"], tree=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        train(engine, [replace(PACKED, config=TreeConfig(verify="first", min_saving=0.1))])
        (found,) = train(engine, [replace(PACKED, config=TreeConfig(min_saving=0.9))])
    assert "call 1 verified against dense" in caplog.text
    assert found["dta"]["dta/dense_fallback"] == 1


def test_in_chunks(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Weights that FSDP2 shards: asked for, an error; where there is a choice, such batches run packed."""
    engine = build(Setup(), folders["qwen3_vl"], tree=True)
    with pytest.raises(InvalidInputError, match=r"executor='streamed' with images.*executor='auto'"):
        train(engine, [replace(PACKED, config=TreeConfig(executor="streamed"))])
    with caplog.at_level("INFO", logger="dta_plugin"):
        _check(Setup(), [replace(PACKED, config=TreeConfig(max_tree_tokens_per_chunk=20))], folders["qwen3_vl"])
    assert "max_tree_tokens_per_chunk=20 is not kept: images" in caplog.text


def _by_ids(patch: pytest.MonkeyPatch) -> None:
    """Places in pictures merge whatever they show."""
    patch.setattr(BatchImages, "identities", lambda images: images.ids)


def _without_gradients_of_the_tower(patch: pytest.MonkeyPatch) -> None:
    own = packed.image_features
    patch.setattr(packed, "image_features", lambda *args: [x.detach() for x in own(*args)])


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("break_it", [make_siblings_visible, _by_ids, _without_gradients_of_the_tower])
def test_negative_control(break_it: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = train(build(Setup(), folders["qwen3_vl"], tree=False), [PADDED])
    break_it(monkeypatch)
    (found,) = train(build(Setup(), folders["qwen3_vl"], tree=True), [PADDED])
    assert difference(found, expected) > 100 * TOLERANCE
