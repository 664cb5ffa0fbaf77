"""`dta verify`: passes on right models, fails on wrong masks (negative controls), explains what it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dta_plugin.attention import TreeMask
from dta_plugin.tree import TreeLayout
from tests.cli.support import (
    AIRLINE,
    needs_airline,
    run_dta,
    save_config,
    save_model,
    save_unsupported_config,
    write_rollouts,
)

SHORT = ("--max-tokens", "64")


@pytest.fixture
def siblings_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a plain causal row: every branch sees the branches before it."""

    def causal(layout: TreeLayout, backend: str = "auto") -> TreeMask:
        return TreeMask(torch.full_like(layout.exit, len(layout.exit)), layout.depth, backend)

    monkeypatch.setattr(TreeMask, "from_layout", staticmethod(causal))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_random_star_passes(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_dta(capsys, "verify", "--model", save_model(tmp_path, family), *SHORT)
    assert (code, err) == (0, "") and out.endswith("PASS\n")
    assert "its weights, float32" in out and "2.67x shared" in out and "dense" in out


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions_pass(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "verify", "--model", save_model(tmp_path), "--dtype", dtype, *SHORT)
    assert code == 0 and "PASS" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("siblings_visible")
def test_a_wrong_mask_fails(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "verify", "--model", save_model(tmp_path), "--dtype", dtype, *SHORT)
    assert code == 1 and "FAIL" in out and "PASS" not in out


def test_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="--lora needs peft")
    code, out, _ = run_dta(capsys, "verify", "--model", save_model(tmp_path), "--lora", *SHORT)
    assert code == 0 and "lora_" in out and "gradient error, of 28" in out


def test_random_weights_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        code, out, _ = run_dta(capsys, "verify", "--model", path, *SHORT)
        assert code == 0 and "random weights" in out


def test_own_rollouts_around_their_first_fork(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "ids.jsonl", [[*range(3, 103), i, *range(40)] for i in range(3, 7)])
    code, out, _ = run_dta(
        capsys, "verify", "--model", save_model(tmp_path / "model"), file, "--limit", "3", "--max-tokens", "32"
    )
    assert code == 0 and "3 rollouts, tokens 84 to 116; token ids" in out
    assert "3 sequences, 96 -> 64 tokens" in out


@needs_airline
def test_airline_rollouts_as_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "verify", "--model", save_model(tmp_path), AIRLINE, "--limit", "4", *SHORT)
    assert code == 0 and "4 rollouts, tokens 6,144 to 6,208; UTF-8 bytes as tokens" in out


def test_chunk_by_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "verify", "--model", save_model(tmp_path), "--executor", "streamed", *SHORT)
    assert code == 0 and "streamed, " in out and "PASS" in out


def test_a_model_that_cannot_run_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_dta(capsys, "verify", "--model", save_unsupported_config(tmp_path), *SHORT)
    assert code == 1 and "no rotary positions" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--limit", "0"], "Expected at least"),
        (["--device", "nonsense"], "Expected a device"),
        (["missing.jsonl"], "cannot be read"),
    ],
)
def test_unusable_options_end_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_dta(capsys, "verify", "--model", save_config(tmp_path), *options)
    assert code == 2 and expected in err and err.count("\n") == 1


def test_tokens_outside_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rollouts(tmp_path / "ids.jsonl", [[5, 999_999]])
    code, _, err = run_dta(capsys, "verify", "--model", save_config(tmp_path / "model"), file)
    assert code == 2 and "vocab_size" in err


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_dta(capsys, "verify", "--model", tmp_path)
    assert code == 2 and "No model configuration" in err
