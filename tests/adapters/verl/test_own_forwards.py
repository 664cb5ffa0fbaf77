"""Models with vision towers on text alone: verl replaces forwards of theirs, some of which go around trees."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")
if Version(version("verl")) < Version("0.9"):
    pytest.skip("tried with verl 0.9", allow_module_level=True)

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from verl.models.transformers import qwen2_vl

from dta_plugin.adapters.verl_plugin.own_forwards import OwnForward, as_transformers_has_them
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from tests.adapters.verl.pictures import QWEN2_5, expected_of, save_vision
from tests.adapters.verl.support import Setup, Step, build, difference, differences, train
from tests.support.tree_run import make_siblings_visible

pytestmark = pytest.mark.usefixtures("not_replaced")
TOLERANCE = 1e-5
STEPS = [Step(position_rows=4), Step(shape="turns", position_rows=4, remove_padding=False)]
STREAMED = Step(shape="turns", position_rows=4, config=TreeConfig(executor="streamed", max_tree_tokens_per_chunk=20))


@pytest.fixture(scope="module")
def qwen2_5_vl(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_attention_that_goes_around_trees(
    strategy: str, lora: bool, qwen2_5_vl: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2.5-VL, checkpointed: layers that run again in the backward pass have their own attention, too."""
    setup = Setup(strategy, lora=lora)
    steps = [*STEPS, STREAMED] if strategy == "fsdp2" else STEPS
    expected = expected_of(setup, steps, qwen2_5_vl)
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = train(build(setup, qwen2_5_vl, tree=True), steps)
    worst = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(worst) < TOLERANCE, worst
    assert all(step["dta"]["dta/dense_fallback"] == 0 for step in found)
    assert "dta: probed" in caplog.text and "not probed" not in caplog.text


def test_verify_compares_with_transformers_own_path(qwen2_5_vl: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = build(Setup(), qwen2_5_vl, tree=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        train(engine, [Step(position_rows=4, config=TreeConfig(verify="first"))])
    assert "call 1 verified against dense" in caplog.text


def test_without_a_tree_forwards_are_verls(qwen2_5_vl: Path) -> None:
    own = [vars(kind)["forward"] for kind in QWEN2_5]
    for _ in range(2):  # for a reference, verl replaces them again
        build(Setup(forward_only=True), qwen2_5_vl, tree=True)
        assert [_forward(kind).own for kind in QWEN2_5] == own
        assert _forward(Qwen2_5_VLAttention).behind is qwen2_vl.qwen2_vl_attn_forward
    with pytest.MonkeyPatch.context() as patch:
        for kind in QWEN2_5:
            patch.setattr(_forward(kind), "behind", lambda *_, **__: "verl's")
            patch.setattr(_forward(kind), "own", lambda *_, **__: "own")
        forwards = [_forward(kind) for kind in QWEN2_5]
        assert {forward(None) for forward in forwards} == {"verl's"}
        assert {forward(None, dta_tree=object()) for forward in forwards} == {"own"}
        with as_transformers_has_them():
            assert {forward(None) for forward in forwards} == {"own"}
        assert {forward(None) for forward in forwards} == {"verl's"}


def _forward(kind: type) -> OwnForward:
    found = vars(kind)["forward"]
    assert isinstance(found, OwnForward)
    return found


@pytest.mark.parametrize("remove_padding", [True, False])
def test_qwen3_vl(remove_padding: bool, rank: None, tmp_path: Path) -> None:
    """verl replaces no attention of it, and runs its tower on text, whose gradients are 0 then."""
    steps = [Step(position_rows=4, remove_padding=remove_padding)]
    found, results = differences(Setup(), steps, save_vision(tmp_path, "qwen3_vl"))
    assert max(found) < TOLERANCE
    assert results[0]["dta"]["dta/dense_fallback"] == 0


@pytest.mark.usefixtures("unprobed")
def test_negative_control(qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(shape="turns", position_rows=4)
    (expected,) = expected_of(Setup(), [step], qwen2_5_vl)
    with pytest.MonkeyPatch.context() as patch:
        make_siblings_visible(patch)
        (found,) = train(build(Setup(), qwen2_5_vl, tree=True), [step])
    assert difference(found, expected) > 100 * TOLERANCE
    engine = build(Setup(), qwen2_5_vl, tree=True)
    monkeypatch.setattr(_forward(Qwen2_5_VLAttention), "along_trees", False)
    monkeypatch.setattr(_forward(Qwen2_5_VLAttention), "behind", _without_attention)
    with pytest.raises(UnsupportedError, match="did not use the tree"):
        train(engine, [step])


def _without_attention(self: Qwen2_5_VLAttention, hidden_states: object, **_: object) -> tuple[object, None]:
    """Where flash-attn is not installed, verl's fails."""
    return hidden_states, None
