"""Calibrations: measured on a real model, found again for it and for no other, and what decisions do with them.

No timing is asserted: gates are tested with speeds that are made up.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dta_plugin import InvalidInputError, TreeConfig
from dta_plugin.calibrate import DenseBatch, calibrate, cases, padded_logprobs
from dta_plugin.execution import calibration_store
from dta_plugin.execution.calibration_store import Calibration, calibration_of, describe, find, tree_cost
from dta_plugin.execution.gate import Decision, saving_obstacle
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.models.introspection import model_cost
from dta_plugin.tree.cost import Padded
from dta_plugin.tree.time_model import SecondsPerFlop
from tests.support.models import tiny_model
from tests.support.trees import star

FAST, SLOW = SecondsPerFlop(1e-3, 1e-9, 1e-9, 1e-9), SecondsPerFlop(2e-3, 2e-9, 2e-9, 2e-9)


def made_up(model: PreTrainedModel, tree: SecondsPerFlop, dense: SecondsPerFlop) -> Calibration:
    return Calibration(tree, dense, "padded", 0.05, describe(model))


def decided(model: PreTrainedModel, config: TreeConfig, sequences: list[list[int]] | None = None) -> Decision:
    sequences = sequences or star(1)
    width = max(map(len, sequences))
    return prepare_batch(model, sequences, None, config, [Padded(len(sequences), width, width - 1, False)]).decision


def test_measured_speeds_predict_something(calibrations: Path) -> None:
    model = tiny_model("qwen3")
    lines: list[str] = []
    found, samples = calibrate(model, seconds=1.0, progress=lines.append)
    assert len(samples) == len(list(cases(100, 256))) and len(lines) == 3
    for sample in samples:
        assert sample.tree_seconds > 0 and sample.dense_seconds > 0
        assert sample.dense_work.linear >= sample.tree_work.linear
    assert found.tree.seconds(samples[-1].tree_work) > 0 and found.dense.seconds(samples[-1].dense_work) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    path = found.save()
    assert path.parent == calibrations and Calibration.load(path) == found == find(model)


def test_padded_logprobs_are_the_models_own() -> None:
    model = tiny_model("qwen3")
    case = list(cases(50, 256))[5]
    rows = DenseBatch.from_case(case, torch.device("cpu"))
    values = padded_logprobs(model, rows)
    for row, (sequence, first) in enumerate(zip(case.sequences, case.first_scored, strict=True)):
        ids = torch.from_numpy(sequence)
        own = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        scored = values[row][rows.attention_mask[row, -rows.columns :].bool()]
        torch.testing.assert_close(scored, own[first - 1 :], rtol=1e-4, atol=1e-4)


def test_batches_are_as_large_as_asked() -> None:
    for tokens in (256, 4096):
        largest = max(DenseBatch.from_case(case, torch.device("cpu")).input_ids.numel() for case in cases(50, tokens))
        assert 0.8 * tokens <= largest <= 1.6 * tokens


@pytest.mark.parametrize(
    "change",
    ["another size", "another dtype", "checkpointing", "adapters", "threads"],
)
def test_found_only_for_what_was_measured(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    made_up(model, FAST, SLOW).save()
    assert find(tiny_model("qwen3")) is not None
    other = tiny_model("qwen3", **({"hidden_size": 64} if change == "another size" else {}))
    if change == "another dtype":
        other = other.bfloat16()
    elif change == "checkpointing":
        other.gradient_checkpointing_enable()
    elif change == "adapters":
        other.get_input_embeddings().requires_grad_(False)
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert find(other) is None


def test_option(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    file = made_up(model, SLOW, FAST).save(tmp_path / "elsewhere" / "speeds.json")
    assert calibration_of(model, TreeConfig()) is None
    assert calibration_of(model, TreeConfig(calibration=str(file))) is not None
    assert calibration_of(model, TreeConfig(calibration="off")) is None
    made_up(model, FAST, SLOW).save()
    assert calibration_of(model, TreeConfig()).tree == FAST


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tree": {"call": 1}}', '{"tree": 3, "dense": 4}'])
def test_unusable_files_are_errors(content: str, tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=r"speeds\.json' cannot be read: .*Expected auto, off, or a file"):
        calibration_of(tiny_model("qwen3"), TreeConfig(calibration=str(file)))


JUNK = {
    "a nested speed": {"tree": {"call": [1], "linear": {}, "attention": 0, "head": 0}},
    "text": {"error": "0.1"},
    "not finite": {"error": float("nan")},
    "a nested machine": {"about": {"model": {"deep": []}}},
    "no machine": {"about": 3},
    "another field": {"more": 1},
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_in_a_calibration_is_one_error(what: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    file = made_up(model, FAST, SLOW).save(tmp_path / "speeds.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | JUNK[what]))
    with pytest.raises(InvalidInputError, match=r"speeds\.json' cannot be read: .*Expected auto, off, or a file"):
        calibration_of(model, TreeConfig(calibration=str(file)))


def test_a_file_for_another_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = made_up(tiny_model("qwen3", torch.bfloat16), FAST, SLOW).save(tmp_path / "speeds.json")
    with caplog.at_level(logging.WARNING):
        assert calibration_of(tiny_model("qwen3"), TreeConfig(calibration=str(file))) is None
    assert "it was measured with dtype bfloat16, here float32; run `dta calibrate`" in caplog.text


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    file = made_up(model, FAST, SLOW).save(tmp_path / "own" / "speeds.json")
    before = file.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        made_up(model, SLOW, FAST).save(file)
    assert file.read_text() == before and list(file.parent.iterdir()) == [file]


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise PermissionError("read-only home")

    monkeypatch.setattr(calibration_store, "cached_assets_path", refuse)
    model = tiny_model("qwen3")
    assert find(model) is None
    with pytest.raises(InvalidInputError, match=r"read-only home\. Give a file with --output"):
        made_up(model, FAST, SLOW).save()


def test_gate_goes_by_predicted_time() -> None:
    model = tiny_model("qwen3")
    made_up(model, SLOW, FAST).save()
    decision = decided(model, TreeConfig())
    assert not decision.use_tree and decision.is_gated
    assert decision.reason.startswith("only -1") and decision.reason.endswith("of dense time saved, as calibrated")
    assert decided(model, TreeConfig(calibration="off")).use_tree, "by FLOPs nothing speaks against the tree"
    shared = decided(model, TreeConfig(), star(16))
    assert shared.use_tree and not shared.is_gated, "sharing outweighs a slower tree"
    assert prepare_batch(model, star(1), None, TreeConfig()).decision.use_tree, "no dense path to compare with"


def test_what_no_sharing_can_save_is_seen_without_a_tree() -> None:
    model = tiny_model("qwen3")
    made_up(model, SLOW, FAST).save()
    row = [Padded(1, 40, 39, False)]
    reason = saving_obstacle(model, 40, 39, row, TreeConfig())
    assert reason is not None and reason.endswith("what the dense path takes as calibrated")
    assert saving_obstacle(model, 40, 39, [Padded(16, 40, 39, False)] * 2, TreeConfig()) is None
    assert saving_obstacle(model, 40, 39, row, TreeConfig(calibration="off")) is None


def test_min_saving_asks_for_more() -> None:
    model = tiny_model("qwen3")
    made_up(model, FAST, SLOW).save()
    assert decided(model, TreeConfig(min_saving=0.45)).use_tree
    decision = decided(model, TreeConfig(min_saving=0.55))
    assert not decision.use_tree
    assert decision.reason == "only 50% of dense time saved, min_saving 55%, as calibrated"


def test_weights_of_trees() -> None:
    model = tiny_model("qwen3")
    flops = model_cost(model)
    assert tree_cost(model, TreeConfig(calibration="off")) == replace(flops, per_call=64 * flops.per_token)
    file = made_up(model, FAST, SLOW).save()
    assert tree_cost(model, TreeConfig(calibration=str(file))) == flops.in_seconds(FAST)


def test_file_is_readable(tmp_path: Path) -> None:
    file = made_up(tiny_model("qwen3"), FAST, SLOW).save(tmp_path / "speeds.json")
    content = json.loads(file.read_text())
    assert content["about"]["model"] == "Qwen3ForCausalLM" and content["tree"]["call"] == 1e-3


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_refuses_no_time(seconds: float) -> None:
    with pytest.raises(InvalidInputError, match="Expected at least 1"):
        calibrate(tiny_model("qwen3"), seconds=seconds)


def barely_slower(model: PreTrainedModel) -> Path:
    return made_up(model, FAST, replace(FAST, linear=0.9e-9)).save()


def test_a_spoilt_cache_stops_no_training(calibrations: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("qwen3")
    path = barely_slower(model)
    path.write_text(path.read_text()[:100])
    with caplog.at_level(logging.WARNING):
        assert calibration_of(model, TreeConfig()) is None
    assert "dta calibrate" in caplog.text


def test_what_streams_is_not_compared_by_time(calibrations: Path) -> None:
    model = tiny_model("qwen3").train()
    barely_slower(model)
    rows = [[1 + i] * 3 + [2] * 60 for i in range(8)]
    for executor in ("auto", "streamed"):
        config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=64)
        assert prepare_batch(model, rows, [3] * 8, config, [Padded(8, 63, 60, False)]).decision.use_tree
    assert not prepare_batch(model, rows, [3] * 8, TreeConfig(), [Padded(8, 63, 60, False)]).decision.use_tree


def test_fsdp_renames_classes(calibrations: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    model = tiny_model("qwen3")
    barely_slower(model)
    model.__class__ = type(f"FSDP{type(model).__name__}", (FSDPModule, type(model)), {})
    assert find(model) is not None
