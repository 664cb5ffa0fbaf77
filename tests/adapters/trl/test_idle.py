"""A flag that did nothing says so, once, and names the class to use; before the training only where that is certain."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeSFTTrainer
from dta_plugin.errors import UnsupportedError
from tests.adapters.trl.support import enabled, train
from tests.adapters.trl.test_own_losses import OwnLogProbs

ONE = {"max_steps": 1}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "use_dta did nothing" in line]


def fine_tune(model: str, output: Path, trainer_class: type) -> None:
    rows = Dataset.from_list([{"text": "w5 w6 w7 w8 w9"}, {"text": "w5 w6 w7 w10"}])
    args = SFTConfig(output_dir=str(output), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = trainer_class(model=model, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Any:
    with caplog.at_level(logging.INFO, "dta_plugin"):
        yield


def test_trainers_that_never_ran_a_tree(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with enabled():
        train(model, tmp_path, OwnLogProbs, GRPOConfig, **ONE)
        assert len(said(caplog)) == 1 and "OwnLogProbs._get_per_token_logps_and_entropies" in said(caplog)[0]
        assert "call super()._get_per_token" in said(caplog)[0]


def test_gated(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_min_saving=0.9, dta_prune="never", **ONE)
    assert len(said(caplog)) == 1 and "min_saving 90%" in said(caplog)[0]


def test_silent_where_trees_ran_or_none_was_asked_for(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with enabled():
        train(model, tmp_path, GRPOTrainer, GRPOConfig, **ONE)
        fine_tune(model, tmp_path, TreeSFTTrainer)
        fine_tune(model, tmp_path, SFTTrainer)
    train(model, tmp_path, GRPOTrainer, GRPOConfig, **ONE)
    train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, use_dta=False, **ONE)
    assert not said(caplog)


def test_a_config_whose_flag_nobody_reads(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedError, match=r"use_dta=True in the config of GRPOTrainer.*TreeGRPOTrainer, or"):
        train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, **ONE)
    train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, dta_on_unsupported="dense", **ONE)
    assert len(said(caplog)) == 1 and "use TreeGRPOTrainer" in said(caplog)[0]


@pytest.mark.long
@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_a_script_that_trains_nothing(tmp_path: Path, end: str) -> None:
    (tmp_path / "script.py").write_text(f"print('ran')\n{end}\n")
    command = [sys.executable, "-m", "dta_plugin.run", str(tmp_path / "script.py")]
    done = subprocess.run([*command, "--use_dta", "true"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "ran"
    assert "use_dta did nothing: the script ended without a training" in done.stdout + done.stderr
