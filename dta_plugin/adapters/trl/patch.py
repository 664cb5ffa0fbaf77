"""Patch TRL's trainer classes in place, so that unmodified scripts, and subclasses they define, use the tree."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from trl import GRPOTrainer, RLOOTrainer

from dta_plugin.adapters.imports import when_imported
from dta_plugin.adapters.trl import async_scoring, hooks, idle
from dta_plugin.adapters.trl.config import override, tree_config
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.upstream import ASYNC, HOOK, PREPARE, check, check_async, say_what_is_untested
from dta_plugin.config import TreeConfig

_HOOKS: dict[str, Callable[..., Any]] = {
    HOOK: hooks.log_probs,
    PREPARE: hooks.prepare_inputs,
}
_own: dict[tuple[type, str], Callable[..., Any]] = {}
_active: TreeConfig | None = None


def enable(config: TreeConfig, flags: Iterable[str] = ()) -> None:
    """See `dta_plugin.enable`. flags: options such as `dta_verify` that go before those of trainers' configs."""
    global _active
    check()
    say_what_is_untested()
    _active = config
    override(config, flags)
    idle.expect_trees(config)
    for trainer_class in (GRPOTrainer, RLOOTrainer):
        for name, hook in _HOOKS.items():
            _put(trainer_class, name, hook)
    when_imported(ASYNC, _reach_async)


def disable() -> None:
    """See `dta_plugin.disable`."""
    global _active
    _active = None
    override(None)
    idle.expect_trees(None)
    for (trainer_class, name), own in _own.items():
        setattr(trainer_class, name, own)
    _own.clear()


def process_config() -> TreeConfig | None:
    """What the process was enabled with, or None."""
    return _active


def _reach_async(module: ModuleType) -> None:
    """TRL's asynchronous trainer, which is imported only by who uses it."""
    if _active is None or not hasattr(module, "TREE_ATTENTION"):  # rows of trees came with TRL 1.16
        return
    check_async()
    _put(module.AsyncGRPOTrainer, "compute_loss", async_scoring.compute_loss)
    _put(module.AsyncGRPOTrainer, "_log_step_metrics", async_scoring.log_step_metrics)
    if (module.AsyncGRPOTrainer, "__init__") not in _own:
        _own[module.AsyncGRPOTrainer, "__init__"] = own = module.AsyncGRPOTrainer.__dict__["__init__"]
        module.AsyncGRPOTrainer.__init__ = _constructor(own)


def _constructor(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def construct(self: object, *args: Any, **kwargs: Any) -> None:
        async_scoring.construct(self, functools.partial(own, self), _active, *args, **kwargs)

    return construct


def _put(trainer_class: type, name: str, hook: Callable[..., Any]) -> None:
    if (trainer_class, name) not in _own:
        _own[trainer_class, name] = own = trainer_class.__dict__[name]
        setattr(trainer_class, name, _in_front_of(own, hook))


def _in_front_of(own: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: GRPOLike, *args: Any, **kwargs: Any) -> Any:
        _say_who_decides(self)
        return hook(self, functools.partial(own, self), _active, *args, **kwargs)

    return method


def _say_who_decides(trainer: GRPOLike) -> None:
    """A config with the flag goes before `enable`; where the two differ, that must not pass in silence."""
    if not hasattr(trainer.args, "use_dta"):
        return
    own = tree_config(trainer.args)
    if own != _active:
        follows = "use_dta=False" if own is None else str(own)
        warnings.warn(
            f"This trainer follows its own config, {follows}, and not what the process was enabled with, {_active}. "
            "Give the options in one place.",
            stacklevel=2,
        )
