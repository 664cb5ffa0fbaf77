"""What one trainer remembers about the tree: its configuration, its call count, and what it has already said."""

from __future__ import annotations

import logging
from typing import Any

from dta_plugin.adapters.logs import say
from dta_plugin.adapters.trl.load import Loads
from dta_plugin.adapters.trl.window import Windows
from dta_plugin.config import TreeConfig
from dta_plugin.execution.batch import SequenceLogProbs


class TreeState:
    """Per-trainer state; `TreeState.of(trainer)` creates it on first use."""

    def __init__(self, config: TreeConfig) -> None:
        self.config = config
        self.calls = 0
        self.windows = Windows()
        self.loads = Loads()
        self._said: set[str] = set()

    @classmethod
    def of(cls, trainer: Any, config: TreeConfig) -> TreeState:
        state = trainer.__dict__.get("_dta_state")
        if state is None or state.config != config:
            state = trainer.__dict__["_dta_state"] = cls(config)
        return state

    def say(self, trainer: Any, message: str, level: int = logging.INFO) -> None:
        """One line in the log of the main process, also where the application has not set up logging."""
        if trainer.accelerator.is_main_process:
            say(message, level)

    def say_once(self, trainer: Any, message: str, topic: str | None = None, level: int = logging.INFO) -> None:
        """The same, but a topic (default: the message itself) is spoken of only once per trainer."""
        topic = topic or message
        if topic not in self._said:
            self._said.add(topic)
            self.say(trainer, message, level)

    def log_metrics(self, trainer: Any, result: SequenceLogProbs | None) -> None:
        """Add the `dta/*` metrics of one policy pass to the trainer's log. result: None for the dense path."""
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        metrics["dta/dense_fallback"].append(float(result is None))
        if result is not None:
            report = result.report
            metrics["dta/flat_tokens"].append(float(report.flat_tokens))
            metrics["dta/tree_tokens"].append(float(report.tree_tokens))
            metrics["dta/compression_ratio"].append(report.compression_ratio)
            metrics["dta/flops_ceiling"].append(report.ceiling)
            metrics["dta/chunks"].append(float(report.chunks))
            metrics["dta/recomputed_tokens"].append(float(report.recomputed_tokens))
