"""One process group of one rank for all tests of Megatron's engine in this process, and tiny models on disk."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import distributed

HAS_MEGATRON = all(map(find_spec, ("verl", "megatron", "mbridge")))
if HAS_MEGATRON:
    from dta_plugin.adapters import verl_cpu  # noqa: F401  (verl's modules ask for the platform as they are imported)
if not HAS_MEGATRON or find_spec("megatron.bridge") is None:
    collect_ignore = ["test_bridge.py"]  # which has an environment of its own


def pytest_ignore_collect() -> bool | None:
    """Without Megatron there is nothing to test. None: as pytest would have it."""
    return None if HAS_MEGATRON else True


@pytest.fixture(scope="package")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from megatron.core import parallel_state

    store = tmp_path_factory.mktemp("store") / "file"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


@pytest.fixture(scope="package")
def folder(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per name in `models.MODELS`."""
    from tests.adapters.megatron.models import save_models

    return save_models(tmp_path_factory.mktemp("models"))
