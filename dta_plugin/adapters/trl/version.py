"""Which TRL releases the adapter supports. Hooks are found by capability; the range is what the tests have seen."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

from dta_plugin.adapters.releases import supported_release

OLDEST, BELOW = "1.0.0", "2"


def check_version() -> None:
    """Raise UnsupportedModelError outside the supported range."""
    supported_release("TRL", OLDEST, BELOW)


def counts_padding(trainer: Any) -> bool:
    """Whether the loss is a mean over padded columns as well, whose number must stay: luspo before TRL 1.10."""
    return getattr(trainer, "loss_type", None) == "luspo" and Version(version("trl")) < Version("1.10.0")
