"""The exceptions of the package. Messages say what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InvalidInputError(ValueError):
    """An argument, option or batch that cannot be used as given.

    option: the field of TreeConfig whose value it is, if it is one; the message then begins with its name.
    """

    def __init__(self, message: str = "", option: str | None = None) -> None:
        super().__init__(message)
        self.option = option

    def named(self, where: str) -> InvalidInputError:
        """The same with the option's name as whoever gave it wrote it; the very same if it is about no option."""
        if self.option is None:
            return self
        return InvalidInputError(f"{where}{str(self).removeprefix(self.option)}", option=self.option)


class UnsupportedError(RuntimeError):
    """A model, setting or version for which prefix-tree execution would not be exact.

    reason: "what; remedy", without the option that falls back, whose name is added where it can be given (`decline`).
    """

    def __init__(self, message: str = "", reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class VerificationError(AssertionError):
    """The tree and the dense path differ by more than rounding explains."""


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence, with a space before it, that names the known word most like the given one; "" if none is like it."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
