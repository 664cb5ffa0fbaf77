"""What one trainer remembers about the tree: its configuration, its call count, and what it has already said."""

from __future__ import annotations

import logging
import math

import torch

from dta_plugin.adapters.logs import say
from dta_plugin.adapters.trl.buffer import Inputs
from dta_plugin.adapters.trl.load import Loads
from dta_plugin.adapters.trl.protocols import GRPOLike, TrainerLike
from dta_plugin.adapters.trl.rows import MicroBatch
from dta_plugin.adapters.trl.subset import HandedOut
from dta_plugin.adapters.trl.weights import LEFT_OUT, is_weighted
from dta_plugin.adapters.trl.window import Windows
from dta_plugin.config import TreeConfig
from dta_plugin.tree.report import TreeReport


class TreeState:
    """Per-trainer state; `TreeState.of(trainer)` creates it on first use."""

    def __init__(self, config: TreeConfig) -> None:
        self.config = config
        self.calls = 0
        self.why_dense: str | None = None  # of the last call that was none
        self.windows = Windows()
        self.loads = Loads()
        self.handed_out: list[HandedOut] = []  # the micro-batches of the current pass over a generation batch
        self.entropy = math.nan  # mean of the micro-batch that last had any
        self._micro_steps_before: int | None = None
        self._said: set[str] = set()

    @staticmethod
    def exists(trainer: TrainerLike) -> bool:
        """Whether the trainer has been used."""
        return "_dta_state" in vars(trainer)

    @classmethod
    def of(cls, trainer: TrainerLike, config: TreeConfig) -> TreeState:
        state = trainer.__dict__.get("_dta_state")
        if state is None or state.config != config:
            state = trainer.__dict__["_dta_state"] = cls(config)
        return state

    def say(self, trainer: TrainerLike, message: str, level: int = logging.INFO) -> None:
        """One line in the log of the main process, also where the application has not set up logging."""
        if trainer.accelerator.is_main_process:
            say(message, level)

    def say_once(self, trainer: TrainerLike, message: str, topic: str | None = None, level: int = logging.INFO) -> None:
        """The same, but a topic (default: the message itself) is spoken of only once per trainer."""
        topic = topic or message
        if topic not in self._said:
            self._said.add(topic)
            self.say(trainer, message, level)

    def micro_step(self, trainer: GRPOLike) -> int:
        """The number of the current micro-step since the training's first one, before it was resumed, too."""
        if self._micro_steps_before is None:
            self._micro_steps_before = trainer.state.global_step * trainer.args.gradient_accumulation_steps
            self._micro_steps_before -= trainer._step
        return self._micro_steps_before + trainer._step

    def of_this_pass(self) -> list[Inputs]:
        """The micro-batches that are handed out in the current pass over the generation batch."""
        return [each.inputs for each in self.handed_out]

    def hands_out_weights(self, trainer: GRPOLike) -> bool:
        """Whether the loss of the current micro-step has weights for a mask."""
        return bool(self.handed_out) and is_weighted(self.handed_out[trainer._step % len(self.handed_out)].inputs)

    def pruned_tokens(self, trainer: GRPOLike, micro_batches: int) -> int:
        """Tokens that the next so many micro-batches have and do not run."""
        slot = trainer._step % max(len(self.handed_out), 1)
        inputs = [each.inputs for each in self.handed_out[slot : slot + micro_batches]]
        return sum(int(each[LEFT_OUT].sum()) for each in inputs if LEFT_OUT in each)

    def with_mean_entropy(
        self, entropies: torch.Tensor, micro_batch: MicroBatch, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Entropies [B, C] with the mean of those that were computed in the balance: of pruned tokens, and of rows
        without any that was drawn.

        TRL's metric is then the mean over tokens that run; before the first of them, NaN.
        """
        mask = attention_mask[:, -micro_batch.columns :]
        weights = mask * micro_batch.scored[:, -micro_batch.columns :]
        if weights.any():
            self.entropy = float((entropies.detach() * weights).sum() / weights.sum())
        fills = torch.zeros_like(weights, dtype=torch.bool)
        fills[:, -1] = mask[:, -1] != 0  # else nothing is left out, and NaN times 0 would be NaN
        if self.config.selection() is not None:  # what was not drawn is made up for by weights
            fills[:, -1] &= ~micro_batch.scored.any(dim=1)
        return entropies.masked_fill(fills, self.entropy)

    def log_selection(self, trainer: GRPOLike, statistics: dict[str, float]) -> None:
        """Add the `dta/*` metrics of what one micro-step has drawn."""
        for name, value in statistics.items():
            trainer._metrics["train"][f"dta/{name}"].append(value)

    def log_metrics(self, trainer: GRPOLike, report: TreeReport | None) -> None:
        """Add the `dta/*` metrics of one policy pass to the trainer's log. report: None for the dense path."""
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        metrics["dta/dense_fallback"].append(float(report is None))
        if report is not None:
            metrics["dta/flat_tokens"].append(float(report.flat_tokens))
            metrics["dta/tree_tokens"].append(float(report.tree_tokens))
            metrics["dta/pruned_tokens"].append(float(report.pruned_tokens))
            metrics["dta/compression_ratio"].append(1.0 if report.is_idle else report.compression_ratio)
            metrics["dta/flops_ceiling"].append(1.0 if report.is_idle else report.ceiling)
            metrics["dta/chunks"].append(float(report.chunks))
            metrics["dta/recomputed_tokens"].append(float(report.recomputed_tokens))
