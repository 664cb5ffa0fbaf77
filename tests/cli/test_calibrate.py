"""`dta calibrate`: measures, reports, and writes what training finds again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dta_plugin.calibrate import DenseBatch
from dta_plugin.cli import calibrate_command
from dta_plugin.cli.calibrate_batches import file_batches
from dta_plugin.execution import calibration_store
from dta_plugin.execution.calibration_store import Calibration
from dta_plugin.tree import PrefixTree
from tests.cli.support import refusal, run_dta, save_config, save_model, write_rollouts

# Two groups, six rollouts of a prompt of 100 tokens and one of its own.
ROLLOUTS = [
    {"uid": "a\x1b", "prompt_ids": [*range(3, 103)], "completion_ids": [i] * (30 + i)} for i in range(200, 206)
] + [{"uid": "b", "prompt_ids": [7, 8], "completion_ids": [9] * 50}]


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


def test_own_rollouts_are_timed(tmp_path: Path, calibrations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "rollouts.jsonl.gz", ROLLOUTS)
    options = ("--seconds", "1", "--dense", "padded", "--model", save_config(tmp_path / "model"))
    code, out, err = run_dta(capsys, "calibrate", file, *options)
    assert (code, err) == (0, "") and all(line.isprintable() for line in out.splitlines())
    assert "7 rollouts in 2 groups; token ids" in out and "32 completions" not in out
    for name in ("one rollout, all scored", "2 groups, a rollout of each", r"6 of group a\x1b", r"2 of group a\x1b"):
        assert f"\n{name} " in out
    assert Calibration.load(next(calibrations.iterdir())).dense_path == "padded"


def test_batches_hold_what_the_file_holds(tmp_path: Path) -> None:
    """Every row is a piece of a rollout, scored from its completion on; siblings are cut where they part."""
    whole = [np.array(row["prompt_ids"] + row["completion_ids"]) for row in ROLLOUTS]
    batches = file_batches(str(write_rollouts(tmp_path / "rollouts.jsonl", ROLLOUTS)), None, 64)
    for tokens in (64, 256, 4096):
        cases = list(batches.cases(tokens))
        assert len(cases) == 8
        for case in cases:
            assert DenseBatch.from_case(case, torch.device("cpu")).input_ids.numel() <= 2 * tokens
            for row, first in zip(case.sequences, case.first_scored, strict=True):
                assert 1 <= first < len(row)
                assert any(row.tobytes() in rollout.tobytes() for rollout in whole)
        siblings = next(case for case in cases if case.name.startswith("6 of group"))
        tree = PrefixTree.from_sequences(siblings.sequences)
        prompt = int((tree.multiplicity == 6).sum())
        assert prompt == siblings.first_scored[0] > 0 and tree.flat_tokens > tree.tree_tokens
    assert sorted(map(len, siblings.sequences)) == sorted(map(len, whole[:6])), "whole, where there is room"


def test_files_that_calibrate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seconds", "1", "--dense", "padded", "--model", save_config(tmp_path / "model"))
    for rows, words in (
        ([[5, 6], 5], "line 2 is a int"),
        ([[5], [6]], "no rollout of two tokens or more"),
    ):
        file = write_rollouts(tmp_path / "rows.jsonl", rows)
        line = refusal(capsys, "calibrate", file, *options)
        assert str(file) in line and words in line
    code, _, err = run_dta(capsys, "calibrate", write_rollouts(tmp_path / "ids.jsonl", [[5, 99_999]]), *options)
    assert code == 2 and "vocab_size" in err and err.count("\n") == 1
