"""What recipes and README tell people to install: releases that are supported, and nothing that pip must build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "recipes" / "verl").glob("*.sh"))
YAMLS = sorted((ROOT / "recipes" / "trl").glob("*.yaml"))
TEXTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", *SCRIPTS, *YAMLS]
MAKEFILE = (ROOT / "Makefile").read_text()
MEGATRON = re.search(r"^MEGATRON \?= (.*)$", MAKEFILE, re.MULTILINE).group(1).split()  # type: ignore[union-attr]
VERSIONS = dict(re.findall(r"^(?:TRL|VERL) \?= (trl|verl)==(\S+)$", MAKEFILE, re.MULTILINE))


def on_gpus(text: str) -> bool:
    """vLLM generates; the other recipes run on CPUs, or sample with transformers."""
    return "rollout.name=vllm" in text or "use_vllm: true" in text


def on_megatron(text: str) -> bool:
    return "model_engine=megatron" in text


@pytest.mark.parametrize("path", [*SCRIPTS, *YAMLS], ids=lambda path: path.name)
def test_vllm_is_the_one_that_the_trainer_pins(path: Path) -> None:
    text, trainer = path.read_text(), "verl" if path.suffix == ".sh" else "trl"
    extra = "megatron" if on_megatron(text) else trainer
    wanted = f"'dta-plugin[{extra}]' '{trainer}[vllm]=={VERSIONS[trainer]}'"
    assert (f"pip install {wanted}" in text) == on_gpus(text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_megatron_is_what_tests_run_with(path: Path) -> None:
    text = path.read_text()
    assert all(package in text for package in MEGATRON) == on_megatron(text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_install_names_what_goes_wrong_on_a_fresh_machine(path: Path) -> None:
    """vLLM without a version is newer than the trainers support; flash-attn's build needs a torch that is there."""
    text = path.read_text()
    assert set(re.findall(r"(trl|verl)\[vllm\]==([^'`\s]+)", text)) <= set(VERSIONS.items())
    assert not re.search(r"pip install[^\n`&]*[\s'](vllm|flash-attn|\w+\[[\w,]*(fsdp|flash)[\w,]*\])", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_verl_does_without_flash_attention(path: Path) -> None:
    """verl's default is flash_attention_2, with Megatron flash; `dta_plugin.adapters.verl_cpu` sets sdpa by itself."""
    text = path.read_text()
    if on_megatron(text):
        assert "megatron.override_transformer_config.attention_backend=auto" in text
        return
    on_cpu = "-m dta_plugin.adapters.verl_cpu" in text or "quickstart.sh" in text
    assert ("+actor_rollout_ref.model.override_config.attn_implementation=sdpa" in text) != on_cpu


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_trl_does_without_flash_attention(path: Path) -> None:
    found = re.findall(r"^attn_implementation: (\S+)", path.read_text(), re.MULTILINE)
    assert set(found) <= {"sdpa"}
