"""The page of `dta inspect --html` in a real browser, clicked through: no error, no request, hostile text inert.

Needs a Chromium on the PATH and `pip install playwright`, which drives it; skipped without.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dta_plugin.cli import main
from tests.cli.support import write_rollouts
from tests.cli.test_html import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]

WORDS = "the of a model tree branch prompt answer because we compute sum price flight order cancel refund"


class Visit:
    """A page that is open; `complaints`: what the console or the network had to say."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requested(request.url, file.as_uri()))
        self.page.goto(file.as_uri())
        self.until("document.documentElement.dataset.ready")
        self.milliseconds = int(self.page.evaluate("document.documentElement.dataset.ready"))

    def requested(self, url: str, own: str) -> None:
        if url != own:
            self.complaints.append(f"requests {url}")

    def until(self, expression: str) -> None:
        """Wait for a condition. (Playwright's own wait evaluates text in the page, which its policy forbids.)"""
        stop = time.perf_counter() + 20
        while not self.page.evaluate(expression):
            assert time.perf_counter() < stop, f"{expression}: {self.complaints}"
            time.sleep(0.01)

    def until_rows(self, host: str, count: str) -> None:
        self.until(f"document.querySelectorAll('#{host} .row').length {count}")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def visit(browser: Any, tmp_path: Path, rows: list[Any], *options: str) -> Visit:
    file, target = write_rollouts(tmp_path / "rows.jsonl", rows), tmp_path / "page.html"
    assert main(["inspect", str(file), "--html", str(target), *options]) == 0
    return Visit(browser, target)


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS.split()) for _ in range(words))


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
    assert seen.text("#tree-title") == "Group 1"
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
    draw = random.Random(0)
    rows = []
    for group in range(groups):
        prompt, plans = sentence(draw, 100), [sentence(draw, 40) for _ in range(max(3, 300 // groups))]
        for _ in range(10_000 // groups):
            answer = f"{draw.choice(plans)} {sentence(draw, 80)}"
            rows.append({"uid": group, "prompt": prompt, "completion": answer, "reward": draw.random()})
    seen = visit(browser, tmp_path, rows)
    page = seen.page
    assert seen.milliseconds < 5000 and (tmp_path / "page.html").stat().st_size < 12_000_000
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
