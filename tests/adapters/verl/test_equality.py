"""verl's engine and the plugin's, step by step: loss, pg_loss, entropy, KL, gradient norm, log-probs. float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.workers.config import FSDPEngineConfig

from dta_plugin.config import TreeConfig
from dta_plugin.tree.layout import ScoredEdges, TreeLayout
from tests.adapters.verl.steps import DYNAMIC, STATIC, STEPS, STREAMED
from tests.adapters.verl.support import (
    ADDITIVE_LOSSES,
    AGGREGATIONS,
    Setup,
    Step,
    build,
    difference,
    differences,
    train,
)

TOLERANCE = 1e-5
LOSSES = [*ADDITIVE_LOSSES, "clip_cov", "kl_cov", "geo_mean", "bypass_mode"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_step_is_equal(strategy: str, lora: bool, folder: Path) -> None:
    steps = STEPS[strategy][::2] if lora else STEPS[strategy]
    found, results = differences(Setup(strategy, lora), steps, folder)
    assert max(found) < TOLERANCE, found
    for step, result in zip(steps, results, strict=True):
        assert result["dta"]["dta/dense_fallback"] == 0
        assert result["dta"]["dta/compression_ratio"] > 1.2
        assert result["dta"]["dta/streamed"] == (step.config.executor == "streamed" or _exceeds(step, strategy))


def _exceeds(step: Step, strategy: str) -> float:
    """Share of micro-batches of one sequence beyond the budget, which run in chunks where the strategy can."""
    return pytest.approx(0.5, abs=0.49) if step.stock_budget and strategy == "fsdp2" else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_without_checkpointing(strategy: str, folder: Path) -> None:
    found, _ = differences(Setup(strategy, checkpointing=False), DYNAMIC + STATIC, folder)
    assert max(found) < TOLERANCE, found


def test_every_policy_loss_and_aggregation(folder: Path) -> None:
    """Those that look at a whole micro-batch keep verl's own micro-batches, so they are equal, too."""
    modes = [*AGGREGATIONS[1:], "seq-mean-token-sum-norm"]
    steps = [Step(loss_mode=loss) for loss in LOSSES] + [Step(loss_agg_mode=mode) for mode in modes]
    found, results = differences(Setup(), steps, folder)
    assert max(found) < TOLERANCE, dict(zip(LOSSES + modes, found, strict=True))
    by_loss = dict(zip(LOSSES, results, strict=False))
    assert by_loss["kl_cov"]["dta"]["dta/micro_batches"] > by_loss["vanilla"]["dta"]["dta/micro_batches"]


FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
DENSE_ONLY = {
    "fused_kernels": (Setup("fsdp", model=FUSED), Step(extra={"use_fused_kernels": True})),
}
if hasattr(FSDPEngineConfig, "pad_to_length"):  # since verl 0.9
    DENSE_ONLY["pad_to_length"] = (Setup(engine={"pad_to_length": True, "pad_to_length_bucket": 64}), Step())


@pytest.mark.parametrize("what", DENSE_ONLY)
def test_what_only_changes_how_dense_runs(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree does without: it never calls the forward that fused kernels replace, and pads nothing."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # verl replaces it for good
    setup, step = DENSE_ONLY[what]
    found, _ = differences(setup, [step], folder)
    assert max(found) < TOLERANCE, found


def test_bfloat16_is_no_further_from_the_truth(folder: Path) -> None:
    (truth,) = train(build(Setup(), folder, tree=False), [Step()])
    stock, tree = (train(build(Setup(dtype="bf16"), folder, tree=tree), [Step()])[0] for tree in (False, True))
    for name in ("log_probs", "entropies"):
        error, own = ((x[name].float() - truth[name]).abs().mean().item() for x in (tree, stock))
        assert error < 1.2 * own, name
    assert difference(tree, truth) < 2 * difference(stock, truth) + 0.01


def test_verify_compares_with_dense(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = build(Setup(), folder, tree=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        train(engine, [Step(shape="turns", temperature=None, config=TreeConfig(verify="first"))])
    assert "call 1 verified against dense" in caplog.text


def _siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TreeLayout.from_tree.__func__

    def everything_visible(cls: type[TreeLayout], *args: object) -> TreeLayout:
        layout = original(cls, *args)
        layout.exit.fill_(len(layout.exit))
        return layout

    monkeypatch.setattr(TreeLayout, "from_tree", classmethod(everything_visible))


def _only_the_first_sequence_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ScoredEdges.per_sequence

    def first_only(self: ScoredEdges, values: object) -> list:
        return [row if i == 0 else row.detach() for i, row in enumerate(original(self, values))]

    monkeypatch.setattr(ScoredEdges, "per_sequence", first_only)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("break_it", [_siblings_see_each_other, _only_the_first_sequence_has_gradients])
def test_negative_control(break_it: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)  # type: ignore[operator]
    found, _ = differences(Setup(), [Step(shape="turns")], folder)
    assert found[0] > 100 * TOLERANCE


def test_streamed_and_packed_differ_in_chunks_only(folder: Path) -> None:
    (packed,), (streamed,) = (
        train(build(Setup(), folder, tree=True), [step]) for step in (Step(shape="turns", budget=48), STREAMED[0])
    )
    assert difference(packed, streamed) < TOLERANCE
    assert streamed["dta"]["dta/chunks"] > packed["dta"]["dta/chunks"]
