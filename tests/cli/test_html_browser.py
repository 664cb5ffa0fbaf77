"""The page of `dta inspect --html` in a real browser, clicked through: no error, no request, hostile text inert.

Skipped without what tests/cli/browsing.py needs; `.ci/run` installs it where it can.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.browsing import CHROMIUM, Visit, launched, sentence, ten_thousand_sequences, written_page
from tests.cli.test_html import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = launched(playwright)
        yield started
        started.close()


def visit(browser: Any, tmp_path: Path, rows: list[Any], *options: str) -> Visit:
    return Visit(browser, written_page(tmp_path, rows, *options))


def test_clicked_through(browser: Any, tmp_path: Path) -> None:
    phrase = sentence(random.Random(0), 30)
    rows = [
        {
            "uid": f"task {i // 4}",
            "prompt": f"Question {i // 4}: ",
            "completion": f"at {i}:00 {phrase}",
            "reward": i % 2,
        }
        for i in range(12)
    ]
    seen = visit(browser, tmp_path, rows)
    page = seen.page
    assert "12 rollouts in 3 groups (by uid)" in seen.text("#summary") and page.locator("#groups .row").count() == 3
    page.fill("#filter", "2")
    seen.until_rows("groups", "=== 1")
    page.click("#groups .row")
    assert seen.text("#tree-title") == "Group task 2"
    page.fill("#filter", "")
    page.click("#forks-tab")
    assert page.is_hidden("#node-panel") and page.locator("#forks-panel .fork").count() == 2
    assert "repeated" in seen.text("#forks-panel") and page.locator("#forks-panel mark").count() > 2
    page.locator("#forks-panel .fork button").first.click()
    assert page.get_attribute("#node-tab", "aria-selected") == "true" and "Tokens 15 to" in seen.text("#node-panel")
    page.click("#search-tab")
    page.fill("#query", "AT 9")
    page.select_option("#scope", "all")
    seen.until("document.querySelector('#found').textContent === '0 nodes'")  # the fork is between "at " and "9"
    page.fill("#query", "9:00 ")
    seen.until_rows("hits", "=== 1")
    page.click("#hits .row")
    page.click("#node-tab")
    assert "9:00" in seen.text("#node-panel .text") and "1 sequence ends here" in seen.text("#node-panel")
    page.select_option("#colour", "reward")
    assert "reward 1" in seen.text("#legend")
    page.select_option("#order", "mean reward")
    page.click("#picture", position={"x": 5, "y": 100})
    assert "Tokens 0 to" in seen.text("#node-panel")
    assert seen.complaints == []


def test_by_keyboard_alone(browser: Any, tmp_path: Path) -> None:
    rows = [{"uid": i // 3, "tokens": [1, 2, 3 + i % 3, 4 + i, 5]} for i in range(6)]
    seen = visit(browser, tmp_path, rows)
    page = seen.page
    page.focus("#groups")
    page.keyboard.press("ArrowDown")
    assert seen.text("#tree-title") == "Group uid 1"
    page.focus("#tree")
    assert page.get_attribute("#tree", "aria-activedescendant") == "tree-0"
    page.keyboard.press("ArrowLeft")
    seen.until_rows("tree", "=== 1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    seen.until("document.querySelector('#tree').getAttribute('aria-activedescendant') === 'tree-3'")
    assert (
        page.get_attribute("#tree-0", "aria-expanded") == "true" and page.get_attribute("#tree-3", "aria-level") == "2"
    )
    page.keyboard.press("ArrowLeft")
    assert "Tokens 0 to 1" in seen.text("#node-panel")
    page.focus("#node-tab")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#forks-tab", "aria-selected") == "true" and seen.complaints == []


def test_hostile_text_is_inert(browser: Any, tmp_path: Path) -> None:
    rows: list[Any] = [{"uid": text, "prompt": text, "completion": text} for text in HOSTILE]
    rows += [
        {"uid": "long", "prompt": "x", "completion": "a" * 1_000_000},
        {"uid": "long", "prompt": "x", "completion": "b"},
    ]
    seen = visit(browser, tmp_path, rows)
    page = seen.page
    for index in range(len(HOSTILE) + 1):
        page.click("#groups .row >> nth=0") if index == 0 else page.keyboard.press("ArrowDown")
        for tab in ("forks", "node"):
            page.click(f"#{tab}-tab")
        page.focus("#groups")
        shown = seen.text("#node-panel") + seen.text("#groups") + seen.text("#tree")
        assert not any(c in shown for c in "\u202e\u2066\x00\x1b\x7f\u2028\u2029\u200b")
    page.select_option("#order", "file order")
    shown = seen.text("#groups")
    assert "</script><script>window" in shown and "⟨U+202E⟩" in shown and "⟨U+D800⟩" in shown
    page.fill("#filter", "long")
    page.click("#groups .row")
    page.focus("#tree")
    page.keyboard.press("ArrowDown")
    assert "Show more" in seen.text("#node-panel") and len(seen.text("#node-panel")) < 20_000
    page.click("#node-panel .plain >> nth=0")
    assert len(seen.text("#node-panel")) > 100_000
    elements = "document.querySelectorAll('img, svg, iframe, script, link, object, embed').length"
    assert page.evaluate(elements) == 2  # its own script, and the data
    assert page.evaluate("window.hacked") is None and seen.complaints == []
    # The control: the policy, too, stops a script that was put into the page.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))")
    assert page.evaluate("window.hacked") is None and "Content Security Policy" in seen.complaints[0]


@pytest.mark.parametrize("groups", [1, 1000])
def test_ten_thousand_sequences_stay_responsive(groups: int, browser: Any, tmp_path: Path) -> None:
    seen = visit(browser, tmp_path, ten_thousand_sequences(groups))
    page = seen.page
    assert seen.milliseconds < 5000 and (tmp_path / "rows.html").stat().st_size < 12_000_000
    page.click("#open-all")
    page.focus("#tree")
    start = time.perf_counter()
    for key in ("End", "PageUp", "Home", "PageDown"):
        page.keyboard.press(key)
        page.wait_for_timeout(1)
    assert time.perf_counter() - start < 4
    assert page.locator("#tree .row").count() < 60 and page.locator("#groups .row").count() < 60
    page.click("#search-tab")
    page.select_option("#scope", "all")
    page.fill("#query", "refund cancel refund")
    seen.until_rows("hits", "> 3")
    seen.until("!document.querySelector('#found').textContent.startsWith('…')")
    assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 900, 1600])
def test_every_panel_is_of_use_at_every_width(width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    """Nothing sticks out sideways; a list is as tall as what it holds, and rows do not run into each other."""
    rows = [{"prompt": f"Question {i % 3}: " + "x" * 400, "completion": f"answer {i} " * 9} for i in range(12)]
    # A branch off every branch: each fork indents what is below it.
    rows += [{"prompt": "deep", "completion": "a" * depth + "b"} for depth in range(40)]
    seen = Visit(browser, written_page(tmp_path, rows), width, 900, scheme)
    page = seen.page
    seen.until_rows("groups", "=== 4")
    page.fill("#filter", "prompt 4")
    seen.until_rows("groups", "=== 1")
    if width < 700:
        assert page.locator(".groups").bounding_box()["height"] < 250
    page.click("#groups .row")
    page.click("#open-all")
    seen.until_rows("tree", "> 10")
    page.fill("#filter", "")
    seen.until_rows("groups", "=== 4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("groups", "tree", "node-panel")}
    assert all(box is not None and box["width"] >= 160 and box["height"] >= 60 for box in boxes.values()), boxes
    if width < 700:  # one panel below the other: the groups leave the tree in sight
        assert boxes["groups"]["height"] < 300 and boxes["tree"]["y"] < 900
    elif width < 980:  # two columns, details below
        assert boxes["groups"]["x"] < boxes["tree"]["x"] and boxes["node-panel"]["y"] > boxes["tree"]["y"]
    overlaps = """[...document.querySelectorAll('#tree .row')].some((row) => {
      const cells = [...row.children].map((cell) => cell.getBoundingClientRect()).filter((cell) => cell.width);
      return cells.some((cell, at) => at && cell.left < cells[at - 1].right - 0.5);
    })"""
    assert not page.evaluate(overlaps) and page.is_hidden("#tree .reward >> nth=0")
    assert seen.complaints == []


def test_a_number_is_no_place_in_the_list(browser: Any, tmp_path: Path) -> None:
    """Groups by equal prompts are numbered in the order of the file; sorted otherwise, each says what its number is."""
    rows = [{"prompt": f"{name} in Rome?", "completion": "yes" * (1 + i)} for i, name in enumerate("ABB")]
    seen = visit(browser, tmp_path, rows)
    seen.until_rows("groups", "=== 2")
    first, second = seen.page.locator("#groups .row").all_inner_texts()
    assert first.startswith("prompt 2") and second.startswith("prompt 1") and "sorted by" in seen.text(".groups .bar")
    assert "B in Rome?yes" in first and "A in Rome?yes" in second and seen.text("#tree-title") == "Group prompt 2"
