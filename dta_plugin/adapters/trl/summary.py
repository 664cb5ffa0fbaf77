"""The end of a training: what ran as trees in one line, and the same numbers in the trainer's last log entry.

That entry, with the time that the training took, goes to everything that `report_to` names. A callback in front of
theirs adds to it: once a training is over, trackers have closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from dta_plugin.adapters.trl.state import TreeState, sharing_of
from dta_plugin.sharing.decoder_hooks import PrefixSharing
from dta_plugin.training.notices import say
from dta_plugin.tree.totals import Totals


@contextmanager
def summed_up(trainer: Trainer) -> Iterator[None]:
    """A training within the context is summed up at its end, once, however many ask for it."""
    if any(isinstance(callback, _Numbers) for callback in trainer.callback_handler.callbacks):
        yield
        return
    kept = _kept(trainer)
    if kept is not None:
        kept.totals = Totals()
    callback = _Numbers(trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    try:
        yield
    finally:
        trainer.callback_handler.callbacks.remove(callback)
    totals = totals_of(trainer)
    if totals is not None and totals.trees and trainer.accelerator.is_main_process:
        ranks = trainer.accelerator.num_processes
        where = f" on the first of {ranks} ranks" if ranks > 1 else ""
        say(f"in this training{where}: {totals}")


def totals_of(trainer: Trainer) -> Totals | None:
    """What was counted since training began; None where nothing of the plugin was asked."""
    kept = _kept(trainer)
    return None if kept is None else kept.totals


def _kept(trainer: Trainer) -> PrefixSharing | TreeState | None:
    """Whoever counts: the handle of a model that shares prefixes, or what the log-prob hook remembers."""
    return sharing_of(trainer) or TreeState.of(trainer)


class _Numbers(TrainerCallback):
    """Adds the numbers to the last entry."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        totals = totals_of(self.trainer)
        if logs is not None and "train_runtime" in logs and totals is not None:
            logs.update(totals.metrics())
            state.log_history[-1].update(totals.metrics())
