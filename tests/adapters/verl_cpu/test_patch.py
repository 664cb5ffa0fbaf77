"""`patches/verl-*.diff`, applied to the installed release: its flag trains as trees, without it nothing is imported."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import verl

from tests.adapters.verl_cpu.test_quickstart import RECIPES, built, check_learning, train

DIFF = RECIPES.parent / "patches" / f"verl-{version('verl')}.diff"
pytestmark = [
    pytest.mark.skipif(not DIFF.exists(), reason="there is no patch for this release"),
    pytest.mark.skipif(shutil.which("patch") is None, reason="the program `patch` is not installed"),
]
BY_FLAG = "actor_rollout_ref.model.external_lib=null"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched package, to go before the installed one."""
    path = tmp_path_factory.mktemp("patched")
    shutil.copytree(Path(verl.__file__).parent, path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["patch", "-p1", "--fuzz=0", "--input", DIFF]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("quickstart"))


def test_flag_on(folder: Path, patched: Path) -> None:
    steps, said = train(folder, BY_FLAG, "actor_rollout_ref.model.use_dta=True", packages=str(patched))
    check_learning(steps)
    assert f"for verl {version('verl')}, process" in said
    for step in steps:
        assert step["actor/dta/compression_ratio"] > 5 and step["actor/dta/dense_fallback"] == 0
        assert step["dta/groups_split"] == 0


@pytest.mark.long
def test_flag_off(folder: Path, patched: Path) -> None:
    steps, said = train(folder, BY_FLAG, packages=str(patched))
    check_learning(steps)
    assert not [name for name in steps[0] if "dta/" in name] and "dta: " not in said
