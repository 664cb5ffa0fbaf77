"""Every supported TRL release trains as its own stock code does, switched on both ways; others are refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dta_plugin
from dta_plugin.errors import UnsupportedError
from tests.adapters.trl.launch import install
from tests.adapters.trl.support import TOLERANCE

ROOT = Path(__file__).parents[3]
SMOKE = Path(__file__).with_name("smoke.py")
# The oldest; three-valued hook and entropy bonus; log-probs in one or in chunks; fused LM head.
RELEASES = ("1.0.0", "1.8.0", "1.14.2", "1.16.0")
# With what it needs.
OLDEST_TRANSFORMERS = (
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "datasets==4.7.0",
    "httpx==0.28.1",
    "httpcore==1.0.9",
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("release", "others"),
    [
        (RELEASES[0], ()),
        *(pytest.param(release, (), marks=pytest.mark.slow) for release in RELEASES[1:]),
        (RELEASES[-1], OLDEST_TRANSFORMERS),
    ],
    ids=[*RELEASES, "oldest transformers"],
)
def test_equal_to_stock(release: str, others: tuple[str, ...], tmp_path: Path) -> None:
    folder = install(release, tmp_path / "trl", *others)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, str(SMOKE)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert found["trl"] == release and Path(found["path"]).is_relative_to(folder)
    assert found["transformers"] == (others[0].partition("==")[2] if others else version("transformers"))
    assert len(found["cases"]) == 10 if release != "1.0.0" else 9, "the entropy bonus came with 1.8"
    for case, differences in found["cases"].items():
        assert differences.keys() == {"patch", "subclass"}
        assert max(differences.values()) <= TOLERANCE, f"{case}: {differences}"


@pytest.mark.long
def test_offline_trainers_of_the_oldest_release(tmp_path: Path) -> None:
    folder = install(RELEASES[0], tmp_path / "trl")
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "tests/adapters/trl/test_offline.py",
        "-k",
        "equal_to_stock",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("release", ["0.29.1", "2.0.0", "2.1.3"])
def test_refuses_other_releases(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    forget_adapter(monkeypatch)
    with pytest.raises(UnsupportedError, match=rf"TRL {release} is installed. Expected 1\.0\.0 <= trl < 2; pip"):
        dta_plugin.enable()


def test_refuses_trl_without_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    forget_adapter(monkeypatch)
    with pytest.raises(UnsupportedError, match="pip install -e CHECKOUT"):
        dta_plugin.enable()


def forget_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had not imported the adapter yet."""
    for name in [name for name in sys.modules if name.startswith("dta_plugin.adapters.trl")]:
        monkeypatch.delitem(sys.modules, name)
