"""`dta calibrate`: measures, reports, and writes what training finds again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dta_plugin.cli import calibrate_command
from dta_plugin.execution import calibration_store
from dta_plugin.execution.calibration_store import Calibration
from tests.cli.support import run_dta, save_config, save_model


@pytest.mark.parametrize("dense", ["trl", "padded"])
def test_measures_and_stores(
    dense: str, tmp_path: Path, calibrations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_dta(
        capsys, "calibrate", "--model", save_model(tmp_path / "model"), "--seconds", "1", "--dense", dense
    )
    assert (code, err) == (0, "")
    (file,) = calibrations.iterdir()
    found = Calibration.load(file)
    assert found.dense_path == dense and file.name.startswith("Qwen3ForCausalLM-")
    assert "ms per call" in out and "32 completions" in out and f"wrote {file}" in out
    assert f"within {found.error:.0%}" in out


def test_as_it_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speeds.json"
    folder = save_config(tmp_path / "model")
    options = ("--lora", "--gradient-checkpointing", "--dtype", "bfloat16", "--output", file)
    code, out, _ = run_dta(capsys, "calibrate", "--model", folder, "--seconds", "1", *options)
    assert code == 0 and f"to use it: --dta_calibration {file}" in out
    about = Calibration.load(file).about
    assert (about["dtype"], about["checkpointing"], about["trained"]) == ("bfloat16", True, "adapters")
    assert about["threads"] == torch.get_num_threads()


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_config(tmp_path / "model")
    code, _, err = run_dta(capsys, "calibrate", "--model", folder, "--seconds", "0.1")
    assert code == 2 and "seconds=0.1. Expected at least 1" in err
    code, _, err = run_dta(capsys, "calibrate", "--model", folder, "--output", tmp_path / "no" / "speeds.json")
    assert code == 2 and "speeds.json cannot be written: " in err
    code, _, err = run_dta(capsys, "calibrate", "--model", folder, "--output", tmp_path)
    assert code == 2 and "is a folder. Expected a file" in err
    monkeypatch.setattr(calibrate_command, "find_spec", lambda name: None)
    code, _, err = run_dta(capsys, "calibrate", "--model", folder, "--dense", "trl")
    assert code == 2 and "TRL is not installed" in err


def test_the_table_is_printed_whatever_happens_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(calibration_store, "_write", full)
    options = ("--seconds", "1", "--dense", "padded", "--output", tmp_path / "speeds.json")
    code, out, err = run_dta(capsys, "calibrate", "--model", save_config(tmp_path / "model"), *options)
    assert code == 2 and "No space left on device. Give a file" in err
    assert "32 completions" in out and "ms per call" in out
