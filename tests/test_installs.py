"""What recipes and README tell people to install: releases that are supported, and nothing that pip must build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "recipes" / "verl").glob("*.sh"))
YAMLS = sorted((ROOT / "recipes" / "trl").glob("*.yaml"))
TEXTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", *SCRIPTS, *YAMLS]
VERSIONS = dict(re.findall(r"^(?:TRL|VERL) \?= (trl|verl)==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def on_gpus(text: str) -> bool:
    """vLLM generates; the other recipes run on CPUs, or sample with transformers."""
    return "rollout.name=vllm" in text or "use_vllm: true" in text


@pytest.mark.parametrize("path", [*SCRIPTS, *YAMLS], ids=lambda path: path.name)
def test_vllm_is_the_one_that_the_trainer_pins(path: Path) -> None:
    text, trainer = path.read_text(), "verl" if path.suffix == ".sh" else "trl"
    wanted = f"'dta-plugin[{trainer}]' '{trainer}[vllm]=={VERSIONS[trainer]}'"
    assert (f"pip install {wanted}" in text) == on_gpus(text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_install_names_what_goes_wrong_on_a_fresh_machine(path: Path) -> None:
    """vLLM without a version is newer than the trainers support; flash-attn's build needs a torch that is there."""
    text = path.read_text()
    assert set(re.findall(r"(trl|verl)\[vllm\]==([^'`\s]+)", text)) <= set(VERSIONS.items())
    assert not re.search(r"pip install[^\n`&]*[\s'](vllm|flash-attn|\w+\[[\w,]*(fsdp|flash)[\w,]*\])", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_verl_does_without_flash_attention(path: Path) -> None:
    """verl's default is flash_attention_2; `dta_plugin.adapters.verl_cpu` sets sdpa by itself."""
    text = path.read_text()
    on_cpu = "-m dta_plugin.adapters.verl_cpu" in text or "quickstart.sh" in text
    assert ("+actor_rollout_ref.model.override_config.attn_implementation=sdpa" in text) != on_cpu


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_trl_does_without_flash_attention(path: Path) -> None:
    found = re.findall(r"^attn_implementation: (\S+)", path.read_text(), re.MULTILINE)
    assert set(found) <= {"sdpa"}
