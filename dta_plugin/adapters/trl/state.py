"""What one trainer remembers about the tree: its configuration, its call count, and what it has already said."""

from __future__ import annotations

import math

import torch

from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.load_balance import LoadBalance
from dta_plugin.adapters.trl.micro_batch import MicroBatch
from dta_plugin.adapters.trl.protocols import GRPOLike, TrainerLike
from dta_plugin.adapters.trl.token_weights import LEFT_OUT, is_weighted
from dta_plugin.adapters.trl.tokens import MicroStepInputs
from dta_plugin.adapters.trl.window import Windows
from dta_plugin.config import TreeConfig
from dta_plugin.sharing.decoder_hooks import PrefixSharing
from dta_plugin.training.notices import Notices
from dta_plugin.training.run_counts import RunCounts
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.totals import Totals


def sharing_of(trainer: object) -> PrefixSharing | None:
    """The handle of the model that a trainer trains, where calls share prefixes; see `SharedPrefixesMixin`."""
    sharing: PrefixSharing | None = vars(trainer).get("_dta_sharing")
    return sharing


class TreeState:
    """Per-trainer state; `TreeState.for_trainer` creates it on first use."""

    def __init__(self, config: TreeConfig, notices: Notices) -> None:
        self.config = config
        self.notices = notices
        self.calls = 0
        self.totals = Totals()  # of policy passes, since training began
        self.why_dense: str | None = None  # of the last call that was none
        self.windows = Windows()
        self.loads = LoadBalance()
        self.micro_steps: list[MicroStepInputs] = []  # of the current pass over a generation batch
        self.entropy = math.nan  # mean of the micro-batch that last had any
        self._micro_steps_before: int | None = None

    @staticmethod
    def of(trainer: object) -> TreeState | None:
        """The trainer's own, once it has been used."""
        state: TreeState | None = vars(trainer).get("_dta_state")
        return state

    @classmethod
    def for_trainer(cls, trainer: TrainerLike, config: TreeConfig) -> TreeState:
        """The trainer's own; a new one where the configuration has changed."""
        state = cls.of(trainer)
        if state is None or state.config != config:
            notices = Notices(speaks=trainer.accelerator.is_main_process)
            state = trainer.__dict__["_dta_state"] = cls(config, notices)
        return state

    def micro_step_number(self, trainer: GRPOLike) -> int:
        """The number of the current micro-step since the training's first one, before it was resumed, too."""
        if self._micro_steps_before is None:
            self._micro_steps_before = trainer.state.global_step * trainer.args.gradient_accumulation_steps
            self._micro_steps_before -= trainer._step
        return self._micro_steps_before + trainer._step

    def inputs_of_this_pass(self) -> list[Inputs]:
        """Those of all micro-steps in the current pass over the generation batch."""
        return [step.inputs for step in self.micro_steps]

    def hands_out_weights(self, trainer: GRPOLike) -> bool:
        """Whether the loss of the current micro-step has weights for a mask."""
        return bool(self.micro_steps) and is_weighted(self.micro_steps[trainer._step % len(self.micro_steps)].inputs)

    def pruned_tokens(self, trainer: GRPOLike, micro_batches: int) -> int:
        """Tokens that the next so many micro-batches have and do not run."""
        slot = trainer._step % max(len(self.micro_steps), 1)
        inputs = self.inputs_of_this_pass()[slot : slot + micro_batches]
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

    def log_selection(self, trainer: GRPOLike, metrics: dict[str, float]) -> None:
        """Add the metrics of what one micro-step has drawn to the trainer's log."""
        for name, value in metrics.items():
            trainer._metrics["train"][name].append(value)

    def log_tree(self, trainer: GRPOLike, report: TreeReport) -> None:
        """Count one policy pass that ran as a tree, and add its metrics to the trainer's log."""
        self.totals.add_tree(report)
        counts = RunCounts()
        counts.add_tree(report)
        self._log(trainer, counts.metrics())

    def log_dense(self, trainer: GRPOLike, reason: str, topic: str | None = None) -> None:
        """Likewise for one that took the dense path. topic: what reasons with numbers in them have in common."""
        self.totals.add_dense(reason, topic)
        self._log(trainer, {"dta/dense_fallback": 1.0})

    def _log(self, trainer: GRPOLike, found: dict[str, float]) -> None:
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in found.items():
            metrics[name].append(float(value))
