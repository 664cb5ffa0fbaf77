"""The three short scripts: they run as they stand, learn, and share."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

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


def test_every_example_is_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == ["dpo", "grpo_lora", "multi_turn"]
