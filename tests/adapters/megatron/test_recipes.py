"""Recipes on 8 and 64 GPUs, by Megatron itself: sizes fit each other, trees may run, memory is as they say.

What verl makes of their options is in tests/adapters/verl_cpu/test_recipes.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
# GB on a GPU, as the recipes say: weights in bfloat16, gradients in float32, what Adam keeps.
MEMORY = {
    ("qwen3_8b_megatron", 8): (8, 16, 12),
    ("qwen3_8b_megatron", 64): (8, 16, 1.5),
    ("qwen3_30b_a3b_megatron", 8): (9, 18, 46),
    ("qwen3_30b_a3b_megatron", 64): (9, 18, 6),
}
KINDS = {
    "qwen3_8b_megatron": {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "SelfAttention"},
    "qwen3_30b_a3b_megatron": {"TEDotProductAttention", "TEGroupedMLP", "TopKRouter", "SelfAttention"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("geometry")
    command = [sys.executable, "-m", "tests.adapters.megatron.geometry_script", str(folder)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | quiet, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "found.json").read_text())
    return {(result["recipe"], result["gpus"]): result for result in results}


@pytest.mark.parametrize(("recipe", "gpus"), MEMORY)
def test_geometry(recipe: str, gpus: int, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    result = found[recipe, gpus]
    assert result["obstacle"] is None
    assert KINDS[recipe] <= set(result["kinds"])
    assert result["layers"] == (48 if "30b" in recipe else 36)
    assert result["recomputes"] == "full"
    sizes = [result[name] / 1e9 for name in ("weights", "gradients", "optimizer")]
    assert sizes == pytest.approx(MEMORY[recipe, gpus], rel=0.07)


def test_every_recipe_is_here(found: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert set(found) == set(MEMORY)
