"""The end of a training with verl's PPO trainers: what ran as trees, in one line of the trainer's process.

verl has no hook there, and some trainers keep their logger to themselves: so `fit` is extended, and while it runs, what
verl's `Tracking.log` gets is read. verl's numbers are means over ranks, and in a step over its optimizer steps; so are
these.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dta_plugin.training.notices import say

_PREFIX = "actor/dta/"


def install_in(trainer: type) -> None:
    """Extend one trainer class. Idempotent."""
    fit = getattr(trainer, "fit", None)
    if fit is not None and not hasattr(fit, "_dta_stock"):
        trainer.fit = summed_up(fit)  # type: ignore[attr-defined]


def summed_up(fit: Callable[..., Any]) -> Any:
    """A trainer's `fit`, a coroutine or not, followed by the line; a training that fails has none."""

    @functools.wraps(fit)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _counted() as steps:
            result = fit(*args, **kwargs)
        _say(steps)
        return result

    @functools.wraps(fit)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with _counted() as steps:
            result = await fit(*args, **kwargs)
        _say(steps)
        return result

    chosen: Any = awaited if inspect.iscoroutinefunction(fit) else wrapped
    chosen._dta_stock = fit
    return chosen


class Steps:
    """The actor's metrics of the plugin, added up over the steps of a training."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}

    def add(self, logged: Mapping[str, Any]) -> None:
        """What a trainer logs at once; not counted where the actor was not updated."""
        found = {name.removeprefix(_PREFIX): value for name, value in logged.items() if name.startswith(_PREFIX)}
        self.count += bool(found)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def __str__(self) -> str:
        """There is at least one step."""
        means = {name: total / self.count for name, total in self._sums.items()}
        names = ("flat_tokens", "tree_tokens", "pruned_tokens", "dense_fallback")
        flat, tree, pruned, dense = (means.get(name, 0.0) for name in names)
        line = (
            f"{self.count:,} step{'' if self.count == 1 else 's'}, {flat:,.0f} -> {tree:,.0f} tokens"
            + (f", {pruned:,.0f} more pruned" if pruned else "")
            + " in an update of one rank on average"
            + (f" ({flat / tree:.2f}x shared)" if tree else "")
        )
        return line + (f"; {dense:.0%} of micro-batches took verl's own path" if dense else "")


@contextmanager
def _counted() -> Iterator[Steps]:
    """Whatever is logged within the context, step by step."""
    from verl.utils.tracking import Tracking

    steps, stock = Steps(), Tracking.log

    @functools.wraps(stock)
    def log(tracking: Any, data: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        steps.add(data)
        return stock(tracking, data, *args, **kwargs)

    Tracking.log = log
    try:
        yield steps
    finally:
        Tracking.log = stock


def _say(steps: Steps) -> None:
    if steps.count:
        say(f"in this training: {steps}")
