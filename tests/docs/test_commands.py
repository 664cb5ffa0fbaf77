"""Every command that README and docs show runs here, is run by another test or by CI, or says that it needs a GPU."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.support import run_dta, save_tokenizer
from tests.docs.commands import EVIDENCE, NEEDS_GPU, PAGES, ROOT, RunBy, Shown, evidence, shown
from tests.support.models import tiny_model

ROLLOUTS = ROOT / "recipes" / "rollouts" / "agent.jsonl"
COMMANDS = sorted({command for page in PAGES for command in shown(page)})
OURS = sorted({command.text for command in COMMANDS if command.text.startswith("dta ")})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, which has a word for every token of its tokenizer."""
    folder = save_tokenizer(tmp_path_factory.mktemp("model"), ROLLOUTS.read_text())
    tiny_model("qwen3", vocab_size=1024).save_pretrained(folder)
    return folder


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30 and {"dta doctor --model PATH", "make quickstart"} <= {text for _, text in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_somebody_runs_it(command: Shown) -> None:
    if command.text in OURS:
        return  # test_dta
    if NEEDS_GPU.match(command.text):
        assert "GPU" in (ROOT / command.page).read_text("utf-8")
        return
    assert evidence(command.text), f"{command.page} shows {command.text!r}: say in tests/docs/commands.py who runs it"


@pytest.mark.parametrize("known", EVIDENCE, ids=lambda known: known.pattern)
def test_evidence_stands(known: RunBy) -> None:
    assert known.mark in (ROOT / known.file).read_text("utf-8")
    assert any(known is evidence(text) for _, text in COMMANDS), "no page shows it any more"


@pytest.mark.parametrize("command", OURS)
def test_dta(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, with files that are there: a tiny model for PATH, the agent's rollouts for rollouts.jsonl."""
    given = {"PATH": str(model), "rollouts.jsonl": str(ROLLOUTS), str(ROLLOUTS.relative_to(ROOT)): str(ROLLOUTS)}
    monkeypatch.chdir(tmp_path)
    words = [given.get(word.strip("[]"), word) for word in shlex.split(command)[1:]]
    code, out, err = run_dta(capsys, *words)
    assert code == 0 and out, err
    if "--html" in words:
        assert (tmp_path / words[words.index("--html") + 1]).stat().st_size > 1000
