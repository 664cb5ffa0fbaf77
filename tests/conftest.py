"""Settings of the whole suite: one thread (tiny tensors), hypothesis examples that are the same in every run, no
calibration that this machine happens to have, and Triton's CPU interpreter where there is no GPU (Triton reads the
variable when it is first imported). Garbage is looked for among what tests make only: accelerate collects after every
training, which takes a second where the libraries' own objects, millions of them, are looked at each time."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
if find_spec("hypothesis"):  # the tests of a GPU machine do without
    from hypothesis import HealthCheck, settings

    settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that were not probed before they run as trees: for faults in trees, and for what is counted."""

    def no_obstacle(model: torch.nn.Module, executors: list[str], *_: object, **__: object) -> dict[str, None]:
        return dict.fromkeys(executors)

    for place in ("execution.auto", "sharing.decisions"):
        monkeypatch.setattr(f"dta_plugin.{place}.probe", no_obstacle)


@pytest.fixture(autouse=True, scope="module")
def garbage_is_young() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind, at the end, takes what was frozen for leaks


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `dta calibrate` writes and training looks: an empty folder."""
    folder = tmp_path / "calibrations"
    folder.mkdir()
    monkeypatch.setattr("dta_plugin.execution.calibration_store.cached_assets_path", lambda *_, **__: folder)
    return folder
