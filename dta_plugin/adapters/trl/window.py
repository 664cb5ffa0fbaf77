"""One tree for the micro-batches of an accumulation window.

With a batch of one or two rows and gradient accumulation, siblings never meet in a micro-batch. But the parameters do
not change within a window, so all its log-probs can come from one tree. The loss of a micro-step goes backward to that
step's log-probs, where the gradient waits; the last step takes all of it through the tree. Every micro-step has the
rows, the loss and the metrics that TRL gave it, and the gradient of the optimizer step is the same sum.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from dta_plugin.adapters.trl.foreign_hooks import window_reader
from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.balance.costs import TOKENS, SequenceCosts
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.prepared_batch import SequenceLogProbs
from dta_plugin.execution.ranks import gathered, is_collective, is_fsdp1
from dta_plugin.models.introspection import causal_lm, input_device, tree_forward
from dta_plugin.training.notices import Notices
from dta_plugin.tree.cost import ModelCost

# One tree must save this share of what separate ones compute: it holds more activations at a time.
_WORTH = 0.05
# A tree that is streamed runs forward twice.
_STREAMED = 4 / 3


def window_size(trainer: GRPOLike, buffer: list[Inputs]) -> int:
    """Micro-batches of a generation batch that always fall into the same optimizer step."""
    return math.gcd(len(buffer), trainer.args.gradient_accumulation_steps)


def merges(
    trainer: GRPOLike,
    config: TreeConfig,
    notices: Notices,
    buffer: list[Inputs],
    separate: list[Inputs],
    cost: ModelCost,
) -> bool:
    """Whether the windows of a new generation batch are to run as one tree each; on all ranks alike.

    separate: the micro-batches that would run otherwise, regrouped or not. cost: what to weigh trees by.
    """
    size = window_size(trainer, buffer)
    if config.merge_window == "never" or size == 1:
        return False
    obstacle = _obstacle(trainer)
    if obstacle is not None and config.merge_window == "always":
        notices.say_once(f"accumulation windows are not merged because of {obstacle}", level=logging.WARNING)
    is_chosen = obstacle is None and (
        config.merge_window == "always"
        or (window_reader(trainer) is None and _pays(trainer, config, cost, buffer[:size], separate[:size]))
    )
    model = trainer.model_wrapped
    return all(gathered(model, is_chosen)) if is_collective(model) else is_chosen


def _obstacle(trainer: GRPOLike) -> str | None:
    """Why one backward pass per window is not possible."""
    wrapped = trainer.model_wrapped
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss, which is computed over each micro-batch"
    if hasattr(wrapped, "zero_optimization_stage"):
        return "DeepSpeed, which drives every backward pass itself"
    if is_fsdp1(wrapped):
        return "FSDP1"
    return None


def _pays(
    trainer: GRPOLike, config: TreeConfig, cost: ModelCost, window: list[Inputs], alternative: list[Inputs]
) -> bool:
    model = causal_lm(trainer.model)

    def total(batches: list[MicroBatch], cost: ModelCost) -> float:
        rows = compared(batches, model)
        return SequenceCosts.from_sequences(rows.sequences, cost, rows.prompt_lengths).total

    together = [MicroBatch.from_inputs(batch, model) for batch in window]
    budget = token_budget(model, input_device(model), config.max_tree_tokens_per_chunk)
    is_streamed = total(together, TOKENS) > budget
    if is_streamed and (config.executor == "packed" or config.backend not in ("auto", "cpu", "triton")):
        return False  # all of it would be held at a time
    streamed = _STREAMED if is_streamed else 1.0
    separate = sum(total([MicroBatch.from_inputs(batch, model)], cost) for batch in alternative)
    return total(together, cost) * streamed < (1 - _WORTH) * separate


Values = tuple[torch.Tensor, torch.Tensor | None]


class Windows(TrainerCallback):
    """The windows of one trainer, one at a time. merges: whether those of the current generation batch are merged.

    As a callback, it forgets what an interrupted training left, and lets no optimizer step without waiting gradients.
    """

    def __init__(self) -> None:
        self.merges = self._is_watching = False
        self._window: _Window | None = None
        self._step = -1  # the micro-step that was served last

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._window, self._step = None, -1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._window = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._window is not None:
            raise InvalidInputError(
                f"The optimizer would step while gradients of {len(self._window.waiting)} micro-batches wait for "
                "the end of their accumulation window. Expected log-probs from the tree in every micro-step of it; the "
                "last one had none: a micro-step was skipped, or `disable()` or other options came in between. Change "
                "options between optimizer steps, or set merge_window='never'."
            )

    def begin(self, trainer: GRPOLike, micro_batch: MicroBatch, buffer: list[Inputs]) -> list[MicroBatch]:
        """What to run together with a micro-batch: the window that begins with it, or itself alone.

        buffer: the micro-batches that are handed out in this pass over the generation batch.
        """
        if not self.merges or trainer._step == self._step or trainer.accelerator.sync_gradients:
            return [micro_batch]
        slot, size = trainer._step % len(buffer), window_size(trainer, buffer)
        if slot % size:
            return [micro_batch]
        rest = [MicroBatch.from_inputs(inputs, trainer.model) for inputs in buffer[slot + 1 : slot + size]]
        return [micro_batch, *rest]

    def opened(
        self, trainer: GRPOLike, model: nn.Module, micro_batches: list[MicroBatch], result: SequenceLogProbs
    ) -> Values:
        """A window that has run: the values of its first micro-batch."""
        if not self._is_watching:
            trainer.add_callback(self)
            self._is_watching = True
        self._window = _Window(micro_batches, result)
        values = self.take(trainer, model, micro_batches[0])
        assert values is not None
        return values

    def take(self, trainer: GRPOLike, model: nn.Module, micro_batch: MicroBatch) -> Values | None:
        """Log-probs and entropies [n] of the next micro-batch's completions; None if no window holds them."""
        if self._window is None or trainer._step == self._step:
            return None
        self._step = trainer._step
        is_last = self._window.is_at_its_last or bool(trainer.accelerator.sync_gradients)
        window = self._window
        if is_last:
            self._window = None
        values = window.take(model, micro_batch, is_last)
        return values[0], values[1] if len(values) > 1 else None


class _Window:
    """Log-probs, and entropies where they are wanted, [V, N] of all completions of several micro-batches."""

    def __init__(self, micro_batches: list[MicroBatch], result: SequenceLogProbs) -> None:
        self.micro_batches = micro_batches
        kinds = [result.logprobs] if result.entropies is None else [result.logprobs, result.entropies]
        self.values = torch.stack([_scored(micro_batches, kind) for kind in kinds])
        self.waiting: list[torch.Tensor] = []

    @property
    def is_at_its_last(self) -> bool:
        return len(self.waiting) == len(self.micro_batches) - 1

    def take(self, model: nn.Module, micro_batch: MicroBatch, is_last: bool) -> torch.Tensor:
        """[V, n] of the next micro-batch; the last one's go backward through the tree, with the gradients of all."""
        index = len(self.waiting)
        if not micro_batch.has_rows_of(self.micro_batches[index]):
            raise InvalidInputError(
                f"Micro-batch {index + 1} of {len(self.micro_batches)} of an accumulation window is not the one that "
                "was buffered when the window began. Expected the same rows; set merge_window='never' if something "
                "changes or skips micro-batches on the way."
            )
        start = sum(x.shape[1] for x in self.waiting)
        rows = slice(start, start + micro_batch.scored_tokens)
        if is_last:
            return _Delivery.apply(_through_wrapper(model, self.values), self.waiting, rows)
        self.waiting.append(self.values[:, rows].detach().requires_grad_())
        return self.waiting[-1]


def unwrapped(model: nn.Module) -> nn.Module:
    """What to run before a window's last micro-step: DDP must see only the pass that it is to reduce."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _through_wrapper(model: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The values as outputs of DDP's own forward, which prepares it for their backward pass."""
    if not isinstance(model, DistributedDataParallel):
        return values
    with tree_forward(causal_lm(model), lambda _, dta_values, **__: {"values": dta_values}):
        return model(dta_values=values)["values"]


def _scored(micro_batches: list[MicroBatch], values: list[torch.Tensor]) -> torch.Tensor:
    rows = iter(values)
    return torch.cat([batch.scored_values([next(rows) for _ in batch.rows.sequences]) for batch in micro_batches])


class _Delivery(torch.autograd.Function):
    """The last rows of a window; backward, the gradients that have waited go along with theirs."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, waiting: list[torch.Tensor], rows: slice):
        ctx.waiting, ctx.rows, ctx.shape = waiting, rows, values.shape
        return values[:, rows].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        whole = gradient.new_zeros(ctx.shape)
        start = 0
        for taken in ctx.waiting:
            stop = start + taken.shape[1]
            if taken.grad is not None:
                whole[:, start:stop] = taken.grad
            start = stop
        whole[:, ctx.rows] = gradient
        return whole, None, None
