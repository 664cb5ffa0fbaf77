"""`enable()` and `disable()`: turn prefix-tree execution on and off for TRL's trainers in this process."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError


def enable(config: TreeConfig | None = None, **options: Any) -> None:
    """Make every trainer of this process share prefixes: GRPO, AsyncGRPO and RLOO as trees, others while they train.

    Idempotent. Trainers that exist already are affected too. A later call replaces the configuration. A trainer whose
    config carries `use_dta` (TreeGRPOConfig) follows its config; where that says something else, a warning tells.

    Args:
        config: how trees run; None for the defaults.
        **options: the fields of TreeConfig in its place: ``enable(verify="first")``.

    Raises:
        InvalidInputError: unknown or invalid options, a config and options at once, or TRL is not installed.
        UnsupportedError: a TRL version that is not supported.
    """
    if config is not None and options:
        raise InvalidInputError(
            "Got both a TreeConfig and options. Expected one of them; put everything into the config."
        )
    _patch().enable(config or TreeConfig.from_options(options))


def enable_by_flags(config: TreeConfig, given: Iterable[str]) -> None:
    """`enable(config)` for a command line. given: the options it names, which win over those of trainers' configs."""
    _patch().enable(config, given)


def disable() -> None:
    """Restore the trainers' own methods and transformers' attention. Trainers without the flag then run stock code.

    Once a config with the flag (TreeGRPOConfig) was made, `Trainer.train` goes on looking at which trainers get one.

    Attention waits for the last graph of a tree call: a checkpointed layer needs it when it is recomputed. A later tree
    call (`sequence_logprobs`, a model under `share_prefixes`, a trainer with the flag) installs it anew.

    Raises:
        InvalidInputError: TRL is not installed.
    """
    from dta_plugin.models.dispatch import uninstall

    uninstall()
    _patch().disable()


def _patch() -> ModuleType:
    if find_spec("trl") is None:
        raise InvalidInputError("TRL is not installed. Expected it beside dta-plugin: pip install 'dta-plugin[trl]'.")
    from dta_plugin.adapters.trl import patch

    return patch
