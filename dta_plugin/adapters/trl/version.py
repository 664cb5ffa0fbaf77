"""What only the number of a TRL release tells; all else is found by capability."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def counts_padding(trainer: object) -> bool:
    """Whether the loss is a mean over padded columns as well, whose number must stay: luspo before TRL 1.10."""
    return getattr(trainer, "loss_type", None) == "luspo" and Version(version("trl")) < Version("1.10.0")
