"""Which TRL releases the adapter supports. Hooks are found by capability; the range is what the tests have seen."""

from __future__ import annotations

from dta_plugin.adapters.releases import supported_release

OLDEST, BELOW = "1.0.0", "2"


def check_version() -> None:
    """Raise UnsupportedModelError outside the supported range."""
    supported_release("TRL", OLDEST, BELOW)
