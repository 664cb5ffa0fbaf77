"""README and docs: what is generated is of today, links of the README lead somewhere, the first screen is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT
from tests.docs.option_table import PAGE, option_table

README = ROOT / "README.md"


def test_options_are_those_of_the_code() -> None:
    assert option_table() in PAGE.read_text("utf-8"), "python -m tests.docs.option_table writes it"


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 120


def test_links_of_the_readme_lead_somewhere() -> None:
    """The site's build checks those of the pages (`make docs`)."""
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text("utf-8"))
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in {_anchor(title) for title in re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M)}, (
                link
            )


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f": {page.name}" not in navigation] == []


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_code_fits_the_sites_column(page: Path) -> None:
    """Commands and Python are read without scrolling; what a program prints is as long as it is."""
    blocks = re.findall(r"^```(?:bash|python|yaml)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 79]
