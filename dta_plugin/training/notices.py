"""What the plugin says while a framework trains: one logger, audible also where the application has set up none.

A thing is said once: by one process, and once by whoever keeps a `Notices` (a trainer, an engine).
"""

from __future__ import annotations

import logging
import sys

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
