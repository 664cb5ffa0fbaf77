"""The three short scripts: they run as they stand, learn, and share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

import dta_plugin
from tests.support.recipes import RECIPES

EXAMPLES = RECIPES / "examples"
pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", ["grpo_lora", "multi_turn", "dpo"])
def test_learns(name: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=RECIPES.parent,
        env=os.environ | {"PYTHONPATH": str(RECIPES.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"(\d\.\d\d) -> (\d\.\d\d)", done.stdout)
    assert found and float(found[2]) > float(found[1]) + 0.05, done.stdout[-1000:]
    shared = re.search(r"every computed token was used (\d+\.\d) times", done.stdout)
    assert shared and float(shared[1]) > 2, done.stdout[-1000:]


def test_what_the_checker_says_carries_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """multi_turn.py up to its training: eight rollouts of each prompt; the mask leaves out the second question."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setattr("sys.path", [*sys.path])
    cells: dict[str, Any] = {"__name__": "__main__"}
    exec((EXAMPLES / "multi_turn.py").read_text().split("trainer.train()")[0], cells)
    trainer, given = cells["trainer"], []
    stock = trainer.rollout_func
    trainer.rollout_func = lambda prompts, trainer: given.extend(prompts) or stock(prompts, trainer)
    try:
        trainer.model.train()
        rows = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    finally:
        dta_plugin.disable()
    assert set(Counter(given).values()) == {8} and len(given) == len(rows["completion_ids"]) == 64
    turns = Counter()
    for prompt, ids, real, own in zip(
        given, rows["completion_ids"], rows["completion_mask"].bool(), rows["tool_mask"].bool(), strict=True
    ):
        asked = trainer.processing_class.decode(ids[real & ~own], skip_special_tokens=True)
        question = prompt.splitlines()[-1].replace("</s> ", "")
        answers = trainer.processing_class.decode(ids[real & own], skip_special_tokens=True)
        assert asked in ("", question) and answers and "Ask" not in answers
        turns[bool(asked)] += 1
    assert min(turns.values()) > 5 and len(turns) == 2, "all rollouts have as many turns"


def test_every_example_is_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == ["dpo", "grpo_lora", "multi_turn"]
