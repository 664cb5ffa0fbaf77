"""What happens in a trainer's process before its first model is built: the plugin is there, its options are right.

verl imports `external_lib` where a model's configuration is read. Trainers with rollouts on GPUs of their own
(`one_step_off_policy`, `fully_async_policy`) read it in workers only, so that here the run's configuration decides: the
plugin is imported in the trainer's process, too, if `external_lib` names it. Nothing else is done to other runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from dta_plugin.adapters.imports import when_imported
from dta_plugin.adapters.verl_plugin.reach import MODULE
from dta_plugin.adapters.verl_plugin.upstream import BEFORE_MODELS


def watch() -> None:
    """Extend the trainer classes that verl imports. Idempotent."""
    for module in BEFORE_MODELS:
        when_imported(module, _extend)


def _extend(module: ModuleType) -> None:
    kind, method = BEFORE_MODELS[module.__name__]
    trainer = getattr(module, kind, None)
    stock = getattr(trainer, method, None)
    if stock is not None and not hasattr(stock, "_dta_stock"):
        setattr(trainer, method, _prepared(stock))


def _prepared(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method that a trainer calls before it starts its workers."""

    @functools.wraps(stock)
    def wrapped(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_named(trainer.config):
            import_module(MODULE)
        if MODULE in sys.modules:
            from dta_plugin.adapters.verl_plugin import balance, run_checks

            run_checks.check_run(trainer.config)
            balance.install_in(type(trainer))
        return stock(trainer, *args, **kwargs)

    wrapped._dta_stock = stock  # type: ignore[attr-defined]
    return wrapped


def _is_named(config: Any) -> bool:
    """Whether `external_lib` of a run's configuration, one name or several, is the plugin."""
    named = config.actor_rollout_ref.model.get("external_lib") or []
    return MODULE in ([named] if isinstance(named, str) else named)
