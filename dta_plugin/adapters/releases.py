"""Which releases of a framework the adapters support, and the newest ones that their tests have run with."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version

from dta_plugin.errors import UnsupportedError
from dta_plugin.training.notices import say


@dataclass(frozen=True, slots=True)
class Releases:
    """From `oldest` on, below `below` where that is known to be too new. A pre-release counts as what it precedes.

    name: as it is written; the package is that in lower case. newest_tested: that release, and all that begin with it.
    """

    name: str
    oldest: str
    newest_tested: str
    below: str | None = None

    @property
    def package(self) -> str:
        return self.name.lower()

    @property
    def module(self) -> str:
        """The top-level module that the package installs."""
        return self.package.partition("-")[0]

    @property
    def tested(self) -> str:
        return f"{self.name} {self.oldest} to {self.newest_tested}"

    @property
    def remedy(self) -> str:
        """What pip is to be told."""
        return f"pip install '{self.package}=={self.newest_tested}.*'"

    def supports(self, version: str) -> bool:
        found = counted_as(version)
        return Version(self.oldest) <= found and (self.below is None or found < Version(self.below))

    def is_untested(self, version: str) -> bool:
        """Whether it is newer than all that tests have seen."""
        tested = Version(self.newest_tested).release
        return counted_as(version).release[: len(tested)] > tested


TRL = Releases("TRL", "1.0.0", "1.16", "2")
VERL = Releases("verl", "0.8.0", "0.9.1", "0.10")
TRANSFORMERS = Releases("transformers", "4.57", "5.24")
TORCH = Releases("torch", "2.8", "2.13")
MEGATRON_CORE = Releases("Megatron-Core", "0.16", "0.16")


def counted_as(version: str) -> Version:
    """The release that a version is, or precedes: 0.10.0 for 0.10.0rc1 and for 0.10.0.dev0."""
    return Version(Version(version).base_version)


def supported_release(releases: Releases, otherwise: str = "") -> str:
    """The installed version of a framework. otherwise: a further remedy, for the message.

    Raises UnsupportedError for one that is not supported.
    """
    name, package = releases.name, releases.package
    expected = f"{releases.oldest} <= {package} < {releases.below}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UnsupportedError(
            f"{name} has no installed version that could be checked. Expected a release or a checkout that pip has "
            f"installed (pip install -e CHECKOUT), {expected}."
        ) from None
    if not releases.supports(found):
        raise UnsupportedError(
            f"{name} {found} is installed. Expected {expected}; pip install 'dta-plugin[{package}]'{otherwise}."
        )
    return found


@functools.cache
def say_if_untested(*frameworks: Releases) -> None:
    """One line, once in a process and by the first rank, about installed versions that are newer than those tested."""
    installed = [(releases, metadata.version(releases.package)) for releases in frameworks]
    newer = [(releases, found) for releases, found in installed if releases.is_untested(found)]
    if newer and os.environ.get("RANK", "0") == "0":
        found = ", ".join(f"{releases.name} {version}" for releases, version in newer)
        tested = ", ".join(f"{releases.name} {releases.newest_tested}" for releases, _ in newer)
        say(
            f"this is {found}, newer than what was tested, up to {tested}; it goes on. verify='first' compares "
            "with the dense path",
            logging.WARNING,
        )
