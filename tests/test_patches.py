"""The diffs of `patches/`: applied to the released package, they train as the untouched release does."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.config import TreeConfig
from dta_plugin.option_types import choices, types_of
from tests.adapters.trl.launch import SCRIPTS, Result, Site, install
from tests.adapters.trl.support import assert_equal, identical

pytestmark = pytest.mark.long

PATCHES = Path(__file__).parents[1] / "patches"
RELEASE = "1.16.0"
SCRIPT = SCRIPTS / "train.py"
# What a process says about the TRL that it imports.
PROBE = """
import dataclasses, json, trl
from trl import GRPOConfig
fields = [f for f in dataclasses.fields(GRPOConfig) if "dta" in f.name]
documented = [f.name for f in fields if f.metadata["help"] and f"        {f.name} (`" in GRPOConfig.__doc__]
options = {f.name: [f.default, str(f.type)] for f in fields}
print(json.dumps({"path": trl.__path__[0], "version": trl.__version__, "options": options, "documented": documented}))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A user's folder with the untouched release."""
    site = Site.build(tmp_path_factory.mktemp("release"))
    return Site(site.folder, (install(RELEASE, site.folder / "packages"),))


@pytest.fixture(scope="module")
def patched(release: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same with the diff applied."""
    if shutil.which("patch") is None:
        pytest.skip("the program `patch` is not installed")
    site = Site.build(tmp_path_factory.mktemp("patched"))
    packages = shutil.copytree(release.path[0], site.folder / "packages")
    done = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--input", PATCHES / f"trl-{RELEASE}.diff"],
        cwd=packages,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offset" not in done.stdout and not list(packages.rglob("*.rej")) and not list(packages.rglob("*.orig"))
    return Site(site.folder, (packages,))


@pytest.fixture(scope="module")
def stock(release: Site) -> Result:
    return release.train("stock", "python", SCRIPT, *release.options())


def probe(site: Site) -> dict[str, Any]:
    done = site.run("python", "-c", PROBE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["path"]) == site.path[0] / "trl" and found["version"] == RELEASE
    return found


def _type_in_trl(kind: Any) -> str:
    """TRL's configs name choices in their texts; their types are str."""
    return str(str if choices(kind) else kind)


def test_offers_the_options(release: Site, patched: Site) -> None:
    assert probe(release)["options"] == {}
    found = probe(patched)
    types = types_of(TreeConfig)
    expected = {"use_dta": [False, str(bool)]}
    expected |= {f"dta_{f.name}": [f.default, _type_in_trl(types[f.name])] for f in fields(TreeConfig)}
    assert found["options"] == expected
    assert found["documented"] == list(expected)


def test_flag_on_trains_like_stock(patched: Site, stock: Result) -> None:
    command = (SCRIPT, *patched.options(), "--use_dta", "true", "--dta_verify", "first")
    result = patched.train("on", "python", *command)
    assert_in(patched, result)
    assert "call 0 verified against dense" in result.output
    assert_equal(stock.run, result.run)


def test_the_launcher_wins_over_the_default(patched: Site, stock: Result) -> None:
    """It takes the flag out of what the script sees, so that the field of the config says use_dta=False."""
    command = ("-m", "dta_plugin.run", SCRIPT, *patched.options(), "--use_dta", "true", "--dta_verify", "first")
    result = patched.train("launched", "python", *command)
    assert not any("dta" in argument for argument in result.arguments)
    assert all(step["dta/dense_fallback"] == 0 for step in result.run.dta) and result.run.dta
    assert "call 0 verified against dense" in result.output and "follows its own config" not in result.output
    assert_equal(stock.run, result.run)


def test_flag_off_is_stock_bit_for_bit(release: Site, patched: Site, stock: Result) -> None:
    result = patched.train("off", "python", SCRIPT, *patched.options())
    assert_in(patched, result)
    assert_in(release, stock)
    assert identical(result.run, stock.run) and not any(result.run.dta)
    assert not any(module.split(".")[0] == "dta_plugin" for module in result.modules)


def test_wrong_option_fails_before_any_model(patched: Site) -> None:
    command = (SCRIPT, *patched.options(), "--use_dta", "true", "--dta_verify", "often")
    done = patched.run("python", *command, "--result", patched.result("wrong"))
    assert done.returncode != 0 and "InvalidInputError: dta_verify='often'. Expected 'off', 'first'" in done.stderr
    assert not Path(f"{patched.result('wrong')}.reached").exists()


def assert_in(site: Site, result: Result) -> None:
    """The trainer that ran came from this folder's packages, and not from another place."""
    assert result.code.is_relative_to(site.path[0])
