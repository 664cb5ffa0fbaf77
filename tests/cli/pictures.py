"""The pictures of the page of `dta inspect --html` that the documentation shows, remade:

    python -m tests.cli.pictures                                            # those in docs
    python -m tests.cli.pictures --all --output /tmp --width 500 --dark     # and a large file, as others see them

The rollouts are made here, by a fixed seed: a booking agent that trains turn by turn, 10,000 sequences, and texts that
would run, reorder or hide something. Needs the extra `browser` and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cli.browsing import Visit, launched, ten_thousand_sequences, written_page
from tests.cli.test_html import HOSTILE

_RULES = """You are the booking agent of a small railway.
The current time is 2026-03-04 09:1{minute}.

- Look a booking up before you change it, and say what a change costs before you make it.
- Seats may be changed up to an hour before departure. A change of the train costs 4 EUR, a seat nothing.
- Bicycles need a place of their own; dogs travel in the last carriage.
- A refund goes back to the card that paid, less 10 %."""
_REPLIES = ("I will check.", "One moment, please.", "Let me look.")
_WISHES = ("move my trip to the later train", "sit by the window", "take my bicycle", "have my money back")
_TOOLS = ("change_seat", "refund", "add_bicycle")


def agent_rows() -> Iterator[dict[str, Any]]:
    """48 bookings, 8 rollouts each: the clock in the system prompt parts siblings that are otherwise alike."""
    draw = random.Random(0)
    for task in range(48):
        booking = {"booking": f"R{task:03}", "from": "Arnau", "to": "Seefeld", "seats": [[12, "window"], [13, "aisle"]]}
        rounds = draw.randrange(3, 6)
        wish = f"I would like to {draw.choice(_WISHES)}. My booking is R{task:03}."
        for _ in range(8):
            messages: list[Any] = [
                {"role": "system", "content": _RULES.format(minute=draw.choice((5, 6)))},
                {"role": "user", "content": wish},
            ]
            for _ in range(rounds):
                call = {"name": draw.choice(_TOOLS[:2]), "arguments": {"booking": f"R{task:03}"}}
                messages.append({"role": "assistant", "content": draw.choice(_REPLIES[:2]), "tool_calls": [call]})
                messages.append({"role": "tool", "content": json.dumps(booking | {"fare": draw.choice((18, 24))})})
            messages.append({"role": "assistant", "content": draw.choice(("Done.", "It is changed. A good journey!"))})
            yield {"task_id": f"booking-{task}", "messages": messages, "reward": draw.randrange(2)}


def hostile_rows() -> Iterator[dict[str, Any]]:
    for text in HOSTILE:
        for answer in (" ", text, "one answer"):
            yield {
                "uid": text,
                "prompt": f"Say this: {text}",
                "completion": answer + text * 2,
                "reward": len(answer) % 2,
            }
    for end in "ab":
        yield {"uid": "a long line " + "without_a_space" * 20, "prompt": "x" * 5000, "completion": "y" * 20_000 + end}


def main() -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--all", action="store_true", help="also of the large file, which the documentation does not show"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder (docs)")
    parser.add_argument("--width", type=int, default=1320, help="of the window, in pixels (1320)")
    parser.add_argument("--height", type=int, default=780, help="of the window, in pixels (780)")
    parser.add_argument("--dark", action="store_true", help="as those see it whose system is dark")
    parser.add_argument("--whole", action="store_true", help="the whole page, however far it scrolls")
    args = parser.parse_args()
    pages: dict[str, tuple[str, list[Any], list[str]]] = {
        "inspect": ("railway_agent", list(agent_rows()), ["--per-turn"]),
        "inspect_large": ("ten_thousand", ten_thousand_sequences(1000), []),
        "inspect_hostile": ("hostile", list(hostile_rows()), []),
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launched(playwright)
        for picture, (name, rows, options) in pages.items():
            if picture == "inspect_large" and not args.all:
                continue
            file = written_page(Path(folder), rows, *options, name=name)
            seen = Visit(browser, file, args.width, args.height, "dark" if args.dark else "light")
            seen.page.click("#forks-tab")
            if name == "hostile":
                seen.page.click("#groups .row:has-text('gnitirw')")
            seen.page.wait_for_timeout(200)
            shot = Image.open(io.BytesIO(seen.page.screenshot(full_page=args.whole)))
            few = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)
            few.save(args.output / f"{picture}.png", optimize=True)
            assert not seen.complaints, seen.complaints
        browser.close()


if __name__ == "__main__":
    main()
