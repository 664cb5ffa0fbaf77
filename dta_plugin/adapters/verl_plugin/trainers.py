"""What happens in a trainer's process before its first model is built: the plugin is there, its options are right.

It gets to the worker of a critic, too, whose model has a configuration of its own.

verl imports `external_lib` where a model's configuration is read. Trainers with rollouts on GPUs of their own
(`one_step_off_policy`, `fully_async_policy`) read it in workers only, so that here the run's configuration decides: the
plugin is imported in the trainer's process, too, if `external_lib` names it. Nothing else is done to other runs.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from dta_plugin.adapters.imports import when_imported
from dta_plugin.adapters.verl_plugin.reach import MODULE, check_names, chosen_in, names_plugin
from dta_plugin.adapters.verl_plugin.upstream import BEFORE_MODELS, WORKERS
from dta_plugin.training.notices import say

_UNREAD = f"verl's own path: there are options in {{}}, but no external_lib={MODULE}"


def watch() -> None:
    """Extend the classes of trainers, and of their critics' workers, that verl imports. Idempotent."""
    for module in BEFORE_MODELS:
        when_imported(module, _extend)
    when_imported(WORKERS, _extend_workers)


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
        run = trainer.config.actor_rollout_ref
        check_names(run.model.get("external_lib"))
        if chosen_in(run.model):
            import_module(MODULE)
        if MODULE not in sys.modules:
            _say_if_options_do_nothing(run.rollout)
        else:
            from dta_plugin.adapters.verl_plugin import balance, run_checks, summary

            run_checks.check_run(trainer.config)
            if trainer.use_critic and run_checks.has_tree_critic(trainer.config):
                _name_in_critic(trainer.config)
            balance.install_in(type(trainer))
            summary.install_in(type(trainer))
        return stock(trainer, *args, **kwargs)

    wrapped._dta_stock = stock  # type: ignore[attr-defined]
    return wrapped


def _say_if_options_do_nothing(rollout: Any) -> None:
    """Of a PPO run without the plugin."""
    from dta_plugin.adapters.verl_plugin.config import KEY

    if (rollout.get("custom") or {}).get("dta"):
        say(_UNREAD.format(KEY), logging.WARNING)


def _extend_workers(module: ModuleType) -> None:
    worker = module.TrainingWorker
    if not hasattr(worker.__init__, "_dta_stock"):
        worker.__init__ = _importing(worker.__init__)


def _importing(init: Callable[..., None]) -> Callable[..., None]:
    """A worker's `__init__`, which chooses the engine: a critic's gets its model's configuration ready-made."""

    @functools.wraps(init)
    def wrapped(worker: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        external_lib = getattr(config.model_config, "external_lib", None)
        check_names(external_lib)
        if names_plugin(external_lib):
            import_module(MODULE)
        elif MODULE not in sys.modules:
            from dta_plugin.adapters.verl_plugin import sft

            if sft.command_has_options():
                say(_UNREAD.format(sft.KEY), logging.WARNING)
        init(worker, config, *args, **kwargs)

    wrapped._dta_stock = init  # type: ignore[attr-defined]
    return wrapped


def _name_in_critic(config: Any) -> None:
    """The critic's model takes the plugin from the actor's, unless options leave verl's own path in place."""
    from omegaconf import open_dict

    model = config.critic.model
    named = model.get("external_lib") or []
    with open_dict(model):
        model.external_lib = [*([named] if isinstance(named, str) else named), MODULE]
