"""A diffusion LM in verl's engine: the gradient is that of the paper's bound, whatever the micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tests.adapters.verl.diffusion_support import (
    SAMPLES,
    advantages_of,
    carry_terms,
    engine_gradient,
    engine_of,
    graph_gradient,
    largest_difference,
    mini_batch,
    save_diffusion_model,
    settings,
)


@pytest.fixture(scope="module")
def diffusion_folder(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion_model(tmp_path_factory.mktemp("diffusion"))


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("shape", ["groups", "turns"])
def test_on_policy_gradient(strategy: str, shape: str, diffusion_folder: Path) -> None:
    engine, data = engine_of(diffusion_folder, settings(), strategy), mini_batch(shape=shape)
    expected, loss = graph_gradient(diffusion_folder, data, None)
    found, outputs = engine_gradient(engine, data)
    assert largest_difference(found, expected) < 1e-5
    assert sum(outputs["loss"]) == pytest.approx(loss, abs=1e-6)
    other, _ = graph_gradient(diffusion_folder, data, None, step=1)
    assert largest_difference(found, other) > 1e-2  # other noise
