"""One process group of one rank for all tests of the engine in this process, and a tiny model on disk."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import distributed

if find_spec("verl"):
    from dta_plugin.adapters import verl_cpu  # noqa: F401  (verl's modules ask for the platform as they are imported)


@pytest.fixture(scope="package")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="package")
def folder(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.adapters.verl.support import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if verl had built no Qwen2-VL in this process, nor Qwen2.5-VL: it replaces their forwards for good."""
    from tests.adapters.verl.pictures import REPLACED

    for kind, forward in REPLACED.items():
        monkeypatch.setattr(kind, "forward", forward)
