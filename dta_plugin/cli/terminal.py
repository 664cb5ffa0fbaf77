"""What the command says while it works and when it fails: one line, printable, progress only where it takes long.

Progress goes to standard error, after two seconds, and only to a terminal.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

_PATIENCE = 2.0  # seconds without a word
_LONGEST = 1200  # characters of a message; what is left out is in its middle


def printable(text: str) -> str:
    """The text with escapes for what is no visible character: it moves no cursor and breaks no XML file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str) -> str:
    """The message as one printable line that a terminal can hold, whatever of a file it quotes."""
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} .. {line[-_LONGEST // 2 :]}"
    return printable(line)


def reason(error: BaseException) -> str:
    """The first line of an error's message, and the one that it announces; the error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def progress(items: Iterable[Item], unit: str) -> Iterable[Item]:
    """The items, counted on the terminal."""
    from tqdm import tqdm

    return tqdm(items, unit=f" {unit}", delay=_PATIENCE, disable=None, leave=False, file=sys.stderr)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is being done if the block takes long."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(_PATIENCE, print, (f"{what} ..",), {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
