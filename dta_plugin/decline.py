"""Refuse or fall back: what `on_unsupported` decides, where it is known who set it, and by which name."""

from __future__ import annotations

from dataclasses import dataclass

from dta_plugin.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Decline:
    """Why the stock way is taken, by a call or in a placement.

    topic: what is said only once, the reason itself unless given.
    """

    reason: str
    topic: str | None = None


def decline(found: str | UnsupportedError, on_unsupported: str, option: str = "on_unsupported='dense'") -> Decline:
    """What keeps a call from being a tree, as the reason of one that falls back.

    found: "what; remedy", without the option. on_unsupported: "error" or "dense". option: what falls back, as the
    caller writes it.

    Raises UnsupportedError with `on_unsupported` "error": what, the remedy, or the option.
    """
    reason = (found.reason if isinstance(found, UnsupportedError) else found).removesuffix(".")
    if on_unsupported != "error":
        return Decline(reason)
    cause = found if isinstance(found, UnsupportedError) else None
    raise UnsupportedError(f"Prefix-tree execution is not exact here: {reason}; or {option}.", reason) from cause
