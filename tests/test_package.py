"""What PyPI shows leads somewhere without a checkout, every dependency is bounded, the repository has one address."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import dta_plugin

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LOCAL = re.compile(r"\]\((?!https://)([^)]+)\)|(?:src|srcset|href)=\"(?!https://)([^\"]+)")


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    return pytest.importorskip("tomllib", reason="Python 3.10 has none").loads((ROOT / "pyproject.toml").read_text())


def test_the_readme_on_pypi_has_no_local_link(package: dict[str, Any]) -> None:
    """The build's own rules; `make wheel-check` reads what they made of the README in the wheel."""
    shown = README
    for rule in package["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        shown = re.sub(rule["pattern"], rule["replacement"].replace("$HFPR_VERSION", dta_plugin.__version__), shown)
    assert len(LOCAL.findall(README)) > 20 and LOCAL.findall(shown) == []
    at_tag = rf"{re.escape(package['project']['urls']['Repository'])}/(?:blob|raw)/v{dta_plugin.__version__}/([^)#]+)"
    targets = re.findall(at_tag, shown)
    assert len(targets) == len(LOCAL.findall(README))
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_every_dependency_has_a_lower_bound(package: dict[str, Any]) -> None:
    """Resolvers that take the oldest (`uv --resolution lowest-direct`) go below everything otherwise."""
    project = package["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "dev"]
    wanted = [one for one in map(Requirement, chain(project["dependencies"], *extras)) if one.name != "dta-plugin"]
    assert len(wanted) > 15
    assert [str(one) for one in wanted if ">=" not in {bound.operator for bound in one.specifier}] == []


def test_the_repository_has_one_address(package: dict[str, Any]) -> None:
    """PyPI's links, the site and the issue templates can not ask each other for it."""
    home = package["project"]["urls"]["Repository"]
    written = [ROOT / "pyproject.toml", ROOT / "mkdocs.yml", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in [*written, *(ROOT / ".github").rglob("*.yml")]:  # which the sdist has not
        found = set(re.findall(r"https://github\.com/[\w.-]+/dta-plugin", path.read_text("utf-8")))
        assert found <= {home}, path
