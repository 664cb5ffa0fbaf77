"""One logger for what adapters have to say, audible also where the application has not set up logging."""

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
