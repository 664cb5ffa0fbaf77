"""`dta doctor`: versions against what the package declares, devices, and what would happen with a model."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dta_plugin.cli import doctor_command
from tests.cli.support import run_dta, save_config, save_unsupported_config
from tests.support.vision_models import vision_model


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run_dta(capsys, "doctor")
    assert err == "" and "attention backend: cpu" in out
    assert "there is no GPU" in out and re.search(r"rate +[\d.e-]+ forward, [\d.e-]+ backward +TFLOP/s .* cpu", out)
    for package in ("dta-plugin", "python", "torch", "triton", "transformers", "trl", "verl", "peft", "accelerate"):
        assert f"  {package} " in out or f"! {package} " in out


@pytest.mark.parametrize(
    "installed, ok", [("1.0.0", True), ("1.99", True), ("0.29.1", False), ("2.0.0", False), (None, True)]
)
def test_trl_versions(installed: str | None, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "trl" and installed:
            return installed
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor_command.metadata, "version", version)
    (trl,) = (finding for finding in doctor_command.versions() if finding.name == "trl")
    assert trl.ok == ok
    assert (">=1.0,<2" if installed else "pip install") in trl.note


@pytest.mark.parametrize(
    "package, installed, note, ok",
    [
        ("trl", "1.16.2", "supported (", True),
        ("trl", "1.19.0", "newer than tested, up to 1.16 (", True),
        ("trl", "2.0.0rc1", "not supported (", False),
        ("transformers", "5.25.0.dev0", "newer than tested, up to 5.24 (", True),
        ("verl", "0.9.2", "newer than tested, up to 0.9.1 (", True),
        ("verl", "0.10.0.dev0", "not supported (", False),
    ],
)
def test_newer_versions(package: str, installed: str, note: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = metadata.version
    monkeypatch.setattr(doctor_command.metadata, "version", lambda name: installed if name == package else own(name))
    (found,) = (finding for finding in doctor_command.versions() if finding.name == package)
    assert found.note.startswith(note) and found.ok == ok


def test_an_unsupported_version_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_command.metadata, "version", lambda package: "0.1")
    code, out, _ = run_dta(capsys, "doctor")
    assert code == 1 and "! trl" in out and "Not supported: torch, triton, transformers, trl" in out


@pytest.mark.parametrize("here", [(), ("trl",), ("verl",), ("trl", "verl")])
def test_something_has_to_train(
    here: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = metadata.version

    def version(package: str) -> str:
        if package not in ("trl", "verl"):
            return own(package)
        if package in here:
            return {"trl": "1.16.0", "verl": "0.9.1"}[package]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor_command.metadata, "version", version)
    monkeypatch.setattr(doctor_command, "devices", lambda: [])
    found = [finding for finding in doctor_command.versions() if finding.name == "trainer"]
    code, out, _ = run_dta(capsys, "doctor")
    if here:
        assert not found and "nothing that trains" not in out
        return
    assert [(finding.value, finding.ok) for finding in found] == [("not installed", False)]
    words = " ".join(out.split())
    assert code == 1 and "! trainer not installed nothing that trains is here: pip install 'dta-plugin[trl]'" in words
    assert "Not supported: trainer." in out


@pytest.mark.parametrize(
    "family, lines",
    [
        ("qwen3", ["Qwen3ForCausalLM", "2 full attention", "scale 1, no soft-cap"]),
        ("gemma2", ["1 sliding attention, 1 full attention", "window 5", "soft-cap 3"]),
        ("qwen3_moe", ["Qwen3MoeForCausalLM"]),
    ],
)
def test_supported_models(family: str, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(tmp_path, family)
    for path in (tmp_path, tmp_path / "config.json"):
        _, out, _ = run_dta(capsys, "doctor", "--model", path)
        assert "--use_dta" in out and "works" in out
        assert all(line in out for line in lines)
    assert all(finding.ok for finding in doctor_command.model_findings(str(tmp_path)))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_models_with_images(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vision_model(family, torch.float32)
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        code, out, _ = run_dta(capsys, "doctor", "--model", path)
        assert code == 0 and type(model).__name__ in out and "images should work" in " ".join(out.split())
    code, out, _ = run_dta(capsys, "verify", "--model", tmp_path, "--executor", "packed")
    assert code == 0 and "PASS" in out


def test_a_model_that_cannot_run_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_dta(capsys, "doctor", "--model", save_unsupported_config(tmp_path))
    assert code == 1 and "no rotary positions" in out and "Not supported: --use_dta." in out


def test_the_verdict_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured for a model that cannot train; else the measurement comes last."""
    _, out, _ = run_dta(capsys, "doctor", "--model", save_config(tmp_path / "qwen3"))
    assert out.index("--use_dta") < out.index("torch ") < out.index("rate ")

    def devices() -> list[object]:
        raise AssertionError("measured before the verdict")

    monkeypatch.setattr(doctor_command, "devices", devices)
    code, out, err = run_dta(capsys, "doctor", "--model", save_unsupported_config(tmp_path / "gpt2"))
    assert (code, err) == (1, "") and out.index("would stop") < out.index("torch ") and "  rate " not in out


def test_training_mode_is_what_counts(tmp_path: Path) -> None:
    save_config(tmp_path, "qwen3", attention_dropout=0.1)
    assert "attention_dropout" in doctor_command.model_findings(str(tmp_path))[-1].note


def test_a_model_that_is_no_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    finding = doctor_command.model_findings(str(tmp_path))[-1]
    assert not finding.ok and "'t5'" in finding.note


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_dta(capsys, "doctor", "--model", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in err and err.count("\n") == 1
