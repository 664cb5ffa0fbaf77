"""The one check of an installed framework's release against the range that an adapter supports."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from dta_plugin.errors import UnsupportedModelError


def supported_release(name: str, oldest: str, below: str, otherwise: str = "") -> str:
    """The installed version of a framework. name: as it is written; its package is that in lower case.

    Raises UnsupportedModelError outside ``oldest <= version < below``. otherwise: a further remedy, for its message.
    """
    package = name.lower()
    expected = f"{oldest} <= {package} < {below}"
    try:
        found = Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        raise UnsupportedModelError(
            f"{name} has no installed version that could be checked. Expected a release or a checkout that pip has "
            f"installed (pip install -e CHECKOUT), {expected}."
        ) from None
    if not Version(oldest) <= found < Version(below):
        raise UnsupportedModelError(
            f"{name} {found} is installed. Expected {expected}; pip install 'dta-plugin[{package}]'{otherwise}."
        )
    return str(found)
