"""Which TRL releases the adapter supports. Hooks are found by capability; the range is what the tests have seen."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from dta_plugin.errors import UnsupportedModelError

OLDEST, BELOW = "1.0.0", "2"


def check_version() -> None:
    """Raise UnsupportedModelError outside the supported range."""
    try:
        found = Version(version("trl"))
    except PackageNotFoundError:
        raise UnsupportedModelError(
            "TRL has no installed version that could be checked. Expected a release or a checkout that pip has "
            f"installed (pip install -e CHECKOUT), {OLDEST} <= trl < {BELOW}."
        ) from None
    if not Version(OLDEST) <= found < Version(BELOW):
        raise UnsupportedModelError(
            f"TRL {found} is installed. Expected {OLDEST} <= trl < {BELOW}; pip install 'dta-plugin[trl]'."
        )
