"""What the plugin says while a framework trains: one logger, audible also where the application has set up none.

A thing is said once: by one process, and once by whoever keeps a `Notices` (a trainer, an engine). So is how the first
tree ran, which is drawn to a file where a path is given.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dta_plugin.tree.report import TreeReport

logger = logging.getLogger("dta_plugin")


def say(message: str, level: int = logging.INFO) -> None:
    """One line, "dta: ...", in the log or on standard output."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.log(level, "dta: %s", message)


class Notices:
    """What has been said on behalf of one trainer or engine. speaks: whether this process does, and not another."""

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self._said: set[str] = set()

    def say(self, message: str, level: int = logging.INFO) -> None:
        """One line, each time."""
        if self.speaks:
            say(message, level)

    def say_once(self, message: str, topic: str | None = None, level: int = logging.INFO) -> None:
        """One line the first time that a topic (default: the message itself) comes up."""
        topic = topic or message
        if topic not in self._said:
            self._said.add(topic)
            self.say(message, level)

    def say_report(self, report: TreeReport, picture: str | None = None, whose: str = "") -> None:
        """How the first call ran that was a tree, and the picture of this tree.

        A call of which no loss reads anything is said apart and is not drawn: what it shared says nothing.

        picture: SVG file, written over; None for no picture. What keeps it from being written is said, and no error.
        whose: goes in front, such as "critic: ".
        """
        topic = "idle" if report.is_idle else "report"
        is_first = topic not in self._said
        self.say_once(f"{whose}{report}", topic)
        if is_first and self.speaks and picture is not None and not report.is_idle:
            _draw(report, Path(os.path.expanduser(picture)).absolute())


def _draw(report: TreeReport, file: Path) -> None:
    """Write the tree's picture, and say where it is, or why it is nowhere."""
    from dta_plugin.tree.picture import draw_svg  # with numpy, which many a process of verl's has no other use for

    pruned = f" ({report.pruned_tokens:,} tokens pruned)" if report.pruned_tokens else ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(draw_svg(report.tree, f"first tree{pruned}"), encoding="utf-8", newline="\n")
    except OSError as error:
        say(f"the first tree is NOT drawn: {file} cannot be written ({error.strerror})", logging.ERROR)
        return
    nothing = "" if report.tree_tokens < report.flat_tokens else ", in which nothing is shared,"
    say(f"the first tree{nothing} is drawn in {file}")
