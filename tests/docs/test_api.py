"""docs/api.md, whose names minor releases keep, and the names that the package exports are the same."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from tests.docs.commands import ROOT

MODULES = (
    "dta_plugin",
    "dta_plugin.adapters.trl",
    "dta_plugin.adapters.trl.async_grpo",
    "dta_plugin.balance",
    "dta_plugin.diffusion",
)


def documented() -> list[tuple[str, str]]:
    """(module, name) of every entry of the page."""
    return re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_the_page_lists_what_a_module_exports(module: str) -> None:
    names = [name for home, name in documented() if home == module]
    assert sorted(names) == sorted(import_module(module).__all__)


def test_the_page_lists_no_other_module() -> None:
    assert {home for home, _ in documented()} == set(MODULES)


def test_every_name_says_what_it_is() -> None:
    assert not [name for home, name in documented() if not getattr(import_module(home), name).__doc__]
