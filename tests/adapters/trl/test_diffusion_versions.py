"""The diffusion trainer's gradients on other TRL releases: the oldest, and the last before the fused LM head."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.trl.launch import install
from tests.support.ranks import REPOSITORY

CASES = "test_every_step and (reference or diffu) or test_the_old_policy or test_peft_config"


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.0.0", "1.14.2"])
def test_gradients(release: str, tmp_path: Path) -> None:
    folder = install(release, tmp_path / "trl")
    tests = ["tests/adapters/trl/test_diffusion.py", "-k", CASES, "-p", "no:xdist", "-q"]
    code = f"import trl, sys, pytest; assert trl.__version__ == '{release}'; sys.exit(pytest.main({tests}))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
