"""Which verl releases the adapter supports: those whose engine registry knows vendors and whose one path is engines."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from dta_plugin.errors import UnsupportedModelError

OLDEST, BELOW = "0.9.0", "0.10"


def checked_version() -> str:
    """The installed version of verl. Raises UnsupportedModelError outside the supported range."""
    try:
        found = Version(version("verl"))
    except PackageNotFoundError:
        raise UnsupportedModelError(
            "verl has no installed version that could be checked. Expected a release or a checkout that pip has "
            f"installed (pip install -e CHECKOUT), {OLDEST} <= verl < {BELOW}."
        ) from None
    if not Version(OLDEST) <= found < Version(BELOW):
        raise UnsupportedModelError(
            f"verl {found} is installed. Expected {OLDEST} <= verl < {BELOW}; pip install 'dta-plugin[verl]', or leave "
            "external_lib=dta_plugin.adapters.verl out."
        )
    return str(found)
