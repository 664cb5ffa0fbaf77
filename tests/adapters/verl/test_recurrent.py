"""Recurrent layers in verl's engine, stock and with the plugin: Qwen3.5, whose forwards verl replaces, and its kin."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")
if Version(version("verl")) < Version("0.9"):
    pytest.skip("verl 0.8 tells no layer where packed rows begin", allow_module_level=True)

from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5GatedDeltaNet
from verl.models.transformers.qwen3_5 import qwen3_5_gated_delta_net_forward

from dta_plugin.config import TreeConfig
from dta_plugin.models.stand_in import StandIn
from tests.adapters.verl.recurrent import (
    OWN_FORWARDS,
    PACKED_ROWS,
    PADDED_ROWS,
    STREAMED,
    rule_that_takes_no_rows,
    save_recurrent,
)
from tests.adapters.verl.support import Setup, Step, build, difference, differences, train
from tests.support.tree_run import make_siblings_visible

# transformers' delta rule computes in float32 in any case; on these weights it rounds log-probs by 1e-6.
TOLERANCE = 1e-5
ELSEWHERE = TreeConfig(min_saving=0.99)  # verl's own path


@pytest.fixture(scope="module")
def qwen3_5(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class of the released models, with a vision tower."""
    return save_recurrent(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def text_alone(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recurrent(tmp_path_factory.mktemp("qwen3_5_text"), "qwen3_5_text")


@pytest.fixture
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own path is exact for packed rows, as it is with kernels."""
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule_that_takes_no_rows)


@pytest.fixture
def own_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers', as if verl had built no multimodal class before."""
    for kind, forward in OWN_FORWARDS.items():
        monkeypatch.setattr(kind, "forward", forward)


def _check(setup: Setup, steps: list[Step], folder: Path) -> None:
    found, results = differences(setup, steps, folder)
    assert max(found) < TOLERANCE, found
    for step, result in zip(steps, results, strict=True):
        assert result["dta"]["dta/dense_fallback"] == 0
        assert result["dta"]["dta/compression_ratio"] > 1.2
        assert result["dta"]["dta/streamed"] == (step.config.executor == "streamed")


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_step_is_equal(lora: bool, qwen3_5: Path) -> None:
    """Checkpointed. LoRA adapts the projections of recurrent layers, too."""
    _check(Setup(lora=lora), [PACKED_ROWS[0], PADDED_ROWS[0]] if lora else PACKED_ROWS[:2], qwen3_5)


@pytest.mark.usefixtures("rows_apart")
def test_in_chunks(qwen3_5: Path) -> None:
    _check(Setup(), [STREAMED], qwen3_5)


@pytest.mark.usefixtures("own_forwards")
def test_the_class_without_a_vision_tower(text_alone: Path) -> None:
    """verl replaces none of its forwards."""
    _check(Setup(checkpointing=False), PADDED_ROWS, text_alone)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_other_families(family: str, rank: None, tmp_path: Path) -> None:
    _check(Setup(), PADDED_ROWS[1:], save_recurrent(tmp_path, family))


@pytest.mark.slow
@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_further_steps(lora: bool, strategy: str, checkpointing: bool, qwen3_5: Path) -> None:
    steps = [*PACKED_ROWS, *PADDED_ROWS, *([STREAMED] if strategy == "fsdp2" else [])]
    _check(Setup(strategy, lora=lora, checkpointing=checkpointing), steps, qwen3_5)


@pytest.mark.usefixtures("rows_apart")
def test_forwards_that_verl_replaces_later(qwen3_5: Path) -> None:
    """The reference, which is built after a step of the actor, has verl put its own forwards there again."""
    step = Step(shape="turns", remove_padding=False)
    expected = train(build(Setup(), qwen3_5, tree=False), [step, step])
    engine = build(Setup(), qwen3_5, tree=True)
    found = train(engine, [step])
    assert isinstance(Qwen3_5GatedDeltaNet.forward, StandIn) and isinstance(Qwen3_5DecoderLayer.forward, StandIn)
    build(Setup(forward_only=True), qwen3_5, tree=True)
    assert Qwen3_5GatedDeltaNet.forward is qwen3_5_gated_delta_net_forward
    found += train(engine, [step])
    assert difference(found[0], expected[0]) < TOLERANCE
    assert found[1]["dta"]["dta/dense_fallback"] == 0


@pytest.mark.usefixtures("unprobed", "rows_apart")
def test_negative_control(qwen3_5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_siblings_visible(monkeypatch)
    found, _ = differences(Setup(), [Step(shape="turns")], qwen3_5)
    assert found[0] > 100 * TOLERANCE


@pytest.mark.usefixtures("own_forwards")
@pytest.mark.parametrize("what", ["no kernels", "not replaced"])
def test_states_that_run_across_packed_rows(
    what: str, qwen3_5: Path, text_alone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """verl's own path, for which this is said; a tree of the same batch is what padded rows give."""
    folder = qwen3_5 if what == "no kernels" else text_alone
    packed, padded = Step(), Step(remove_padding=False)
    mixed, expected = (train(build(Setup(), folder, tree=False), [step])[0] for step in (packed, padded))
    assert difference(mixed, expected) > 100 * TOLERANCE
    engine = build(Setup(), folder, tree=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        assert difference(train(engine, [packed])[0], expected) < TOLERANCE
        assert "run across packed rows" not in caplog.text
        train(engine, [Step(config=ELSEWHERE)])
    assert caplog.text.count("run across packed rows") == 1


@pytest.mark.usefixtures("rows_apart")
def test_rows_that_are_kept_apart_are_not_mentioned(qwen3_5: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dta_plugin"):
        train(build(Setup(), qwen3_5, tree=True), [Step(config=ELSEWHERE)])
    assert "verl's own path: only" in caplog.text and "run across packed rows" not in caplog.text
