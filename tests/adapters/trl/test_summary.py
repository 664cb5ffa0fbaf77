"""The end of a training: one line of what ran as trees, and the same numbers in the last entry of every tracker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeSFTTrainer
from dta_plugin.adapters.trl.summary import _Numbers
from dta_plugin.execution.calibration_store import Calibration, describe
from dta_plugin.tree.time_model import SecondsPerFlop
from tests.adapters.trl.support import build, enabled


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Any:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "in this training" in line]


class Tracker(TrainerCallback):
    """What a tracker is told, until training ends."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self.is_closed = False

    def on_log(self, *args: Any, logs: dict[str, float], **_: Any) -> None:
        assert not self.is_closed
        self.entries.append(dict(logs))

    def on_train_end(self, *args: Any, **_: Any) -> None:
        self.is_closed = True


def tracked(trainer: Any) -> list[dict[str, float]]:
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert not any(isinstance(each, _Numbers) for each in trainer.callback_handler.callbacks)
    assert totals([trainer.state.log_history[-1]]) == totals(tracker.entries)
    trainer.remove_callback(tracker)
    return tracker.entries


def totals(entries: list[dict[str, float]]) -> dict[str, float]:
    assert not any("total_" in name and "dta/" in name for entry in entries[:-1] for name in entry)
    return {name: value for name, value in entries[-1].items() if name.startswith("dta/total_")}


def sft(model: str, output: Path, trainer_class: type, rows: list[str], **options: Any) -> Any:
    args = SFTConfig(
        output_dir=str(output),
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    data = Dataset.from_list([{"text": text} for text in rows])
    return trainer_class(model=model, args=args, train_dataset=data)


SHARED = ["w5 w6 w7 w8 w9", "w5 w6 w7 w10 w11"] * 8


def test_grpo_twice(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_prune="never")
    entries = tracked(trainer)
    found = totals(entries)
    steps = [entry for entry in entries if "dta/flat_tokens" in entry]
    assert len(steps) == 3 and found["dta/total_dense_fallback"] == 0
    for name in ("flat_tokens", "tree_tokens"):
        assert found[f"dta/total_{name}"] == sum(entry[f"dta/{name}"] for entry in steps) > 0
    assert 0.3 < found["dta/total_flops_saved"] < 0.7 and "dta/total_seconds_saved" not in found
    flat, tree = found["dta/total_flat_tokens"], found["dta/total_tree_tokens"]
    (line,) = lines(caplog)
    assert f"3 trees, {flat:,} -> {tree:,} tokens ({flat / tree:.2f}x shared), " in line and "% of FLOPs saved" in line
    caplog.clear()
    again = totals(tracked(trainer))  # counted anew
    assert f"3 trees, {again['dta/total_flat_tokens']:,} -> " in lines(caplog)[0]


def test_fallbacks_have_their_reasons(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = {"dta_min_saving": 0.9, "dta_prune": "never"}
    found = totals(tracked(build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **gate)))
    assert found == {"dta/total_dense_fallback": 1.0}
    assert not lines(caplog) and "use_dta did nothing" in caplog.text  # which says why
    alone = tracked(sft(model, tmp_path, TreeSFTTrainer, SHARED[:1], per_device_train_batch_size=2))
    assert totals(alone) == {"dta/total_dense_fallback": 1.0} and not lines(caplog)


def test_some_calls_fell_back(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that come alone have nobody to share with."""
    with enabled():
        trainer = sft(
            model, tmp_path, SFTTrainer, SHARED[:3], per_device_train_batch_size=2, dataloader_drop_last=False
        )
        trainer.args.max_steps = 4
        found = totals(tracked(trainer))
    assert found["dta/total_dense_fallback"] == 0.5
    (line,) = lines(caplog)
    assert "2 trees, " in line and "2 of 4 calls took the model's own path: it has no second row" in line
    assert type(trainer) is SFTTrainer


def test_predicted_seconds(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_prune="never")
    trainer.model.train()
    fast, slow = SecondsPerFlop(0.0, 1e-9, 1e-9, 1e-9), SecondsPerFlop(0.0, 1e-6, 1e-6, 1e-6)
    file = Calibration(fast, slow, "stock", 0.1, describe(trainer.model)).save(tmp_path / "speeds.json")
    trainer.args.dta_calibration = str(file)
    found = totals(tracked(trainer))
    assert found["dta/total_seconds_saved"] > 0 and " s saved as calibrated" in lines(caplog)[0]


def test_silent_without_the_flag(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert totals(tracked(build(model, tmp_path, GRPOTrainer, GRPOConfig))) == {}
    assert totals(tracked(build(model, tmp_path, GRPOTrainer, TreeGRPOConfig, use_dta=False))) == {}
    assert not lines(caplog)


def test_tensorboard_gets_the_numbers(model: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    build(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, report_to="tensorboard").train()
    (file,) = tmp_path.rglob("events.out*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert any(name.endswith("dta/total_flops_saved") for name in events.Tags()["scalars"])
