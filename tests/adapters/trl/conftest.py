"""Models on disk, built once."""

from __future__ import annotations

import pytest

from tests.adapters.trl.support import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3."""
    return save_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3-MoE."""
    return save_model(tmp_path_factory.mktemp("qwen3_moe"), moe=True)
