"""A page of `dta inspect --html` in a real browser: what the browser tests and `tests.cli.pictures` share.

Needs a Chromium on the PATH and the extra `browser`: playwright, which drives it.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from dta_plugin.cli import main
from tests.cli.support import write_rollouts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WORDS = "the of a model tree branch prompt answer because we compute sum price flight order cancel refund"


class Visit:
    """A page that is open; `complaints`: what the console or the network had to say."""

    def __init__(self, browser: Any, file: Path, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
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


def launched(playwright: Any) -> Any:
    """Chromium; without its sandbox, which root may not use, and without /dev/shm, which is small in containers."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])


def written_page(folder: Path, rows: list[Any], *options: str, name: str = "rows") -> Path:
    """The page of these rows."""
    file, target = write_rollouts(folder / f"{name}.jsonl", rows), folder / f"{name}.html"
    assert main(["inspect", str(file), "--html", str(target), *options]) == 0
    return target


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS.split()) for _ in range(words))


def ten_thousand_sequences(groups: int) -> list[Any]:
    """Rows of that many sequences in so many groups, several plans in each."""
    draw, rows = random.Random(0), []
    for group in range(groups):
        prompt, plans = sentence(draw, 100), [sentence(draw, 40) for _ in range(max(3, 300 // groups))]
        for _ in range(10_000 // groups):
            answer = f"{draw.choice(plans)} {sentence(draw, 80)}"
            rows.append({"uid": group, "prompt": prompt, "completion": answer, "reward": draw.random()})
    return rows
