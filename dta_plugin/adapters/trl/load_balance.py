"""How evenly work is spread, in TRL's log: micro-batches of an optimizer step, and ranks, predicted and measured.

Loads are the largest over the mean, 1.0 if even. Predicted: by the cost model, from tokens. Measured: seconds in which
a rank works on a micro-step by itself, from its inputs to its log-probs and from their gradient to that of the
parameters. What lies between and after, TRL's own metrics and the sum of gradients over ranks, waits for other ranks
and would make all of them look alike. (Under FSDP every layer waits; ranks look more alike there than they are.) On
CUDA, events measure, and are read when TRL logs: nothing is synchronised before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.balance.costs import TOKENS, SequenceCosts, loads
from dta_plugin.tree.cost import ModelCost

Mark = float | torch.cuda.Event

# Steps between two logs that are kept, the last ones; a training that never logs must not collect them all.
_MOST_STEPS = 512


@dataclass(slots=True, eq=False)
class _MicroStep:
    """predicted: cost. repeated: prefix tokens computed more than once because siblings are apart.

    merged: its window runs as one tree. spans: when it was worked on.
    """

    predicted: float
    repeated: float
    merged: bool
    spans: list[tuple[Mark, Mark]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(_seconds(*span) for span in self.spans)


class LoadBalance(TrainerCallback):
    """The loads of one trainer's optimizer steps, written into its metrics whenever it logs."""

    def __init__(self) -> None:
        self._plan: list[tuple[float, float]] = []  # per slot of the generation batch: cost, repeated tokens
        self._merged = False
        self._trainer: GRPOLike | None = None
        self._device = torch.device("cpu")
        self._begun: Mark | None = None
        self._current: list[_MicroStep] = []
        self._steps: deque[list[_MicroStep]] = deque(maxlen=_MOST_STEPS)

    def plan(
        self,
        trainer: GRPOLike,
        buffer: list[Inputs],
        window: int,
        merged: bool,
        cost: ModelCost,
        between: Sequence[float],
    ) -> None:
        """A new generation batch. between: per window, tokens that are repeated between ranks, as far as known."""
        self._plan = []
        if self._trainer is None:
            self._trainer = trainer
            trainer.add_callback(self)
        self._device = trainer.accelerator.device
        self._merged = merged
        for start in range(0, len(buffer), window):
            loads, repeated = _window_loads(trainer, buffer[start : start + window], merged, cost)
            repeated += between[start // window] if between and trainer.accelerator.is_main_process else 0.0
            self._plan += [(load, repeated if slot == 0 else 0.0) for slot, load in enumerate(loads)]

    def hands_out(self, slot: int) -> None:
        """A micro-step begins, with the inputs of this slot."""
        if self._plan:
            self._current.append(_MicroStep(*self._plan[slot], self._merged))
            self._begun = _mark(self._device)

    def runs_dense(self) -> None:
        """The micro-step builds no tree: what was predicted does not describe it."""
        if self._begun is not None:
            self._begun = None
            self._current.pop()

    def scored(self, logprobs: torch.Tensor) -> None:
        """The micro-step has its log-probs; it goes on when their gradient arrives."""
        if self._begun is None or not logprobs.requires_grad:
            return
        spans = self._current[-1].spans
        spans.append((self._begun, _mark(self._device)))
        self._begun = None

        def goes_backward(_: torch.Tensor) -> None:
            begun = _mark(self._device)
            # Called after the last gradient, before what DDP queues later: its wait for the other ranks.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: spans.append((begun, _mark(self._device))))

        logprobs.register_hook(goes_backward)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begun, self._current = None, []
        self._steps.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked_for_log_probs = all(step.spans for step in self._current)  # else what was planned is not what ran
        self._steps.append(self._current if asked_for_log_probs else [])
        self._begun, self._current = None, []
        if control.should_log:
            self._report()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_log:
            self._report()

    def _report(self) -> None:
        """Write what has come together since the last time; one collective where there are several ranks."""
        own = [[sum(map(value, step)) for value in (_predicted, _measured, _repeated)] for step in self._steps]
        ranks = _of_all_ranks(own)
        for number, step in enumerate(self._steps):
            if len(step) > 1 and not step[0].merged:
                self._write("micro_batch_load_predicted", _imbalance(list(map(_predicted, step))))
                self._write("micro_batch_load_measured", _imbalance(list(map(_measured, step))))
            predicted, measured, repeated = zip(*(rank[number] for rank in ranks), strict=True)
            if len(ranks) > 1:
                self._write("rank_load_predicted", _imbalance(predicted))
                self._write("rank_load_measured", _imbalance(measured))
            if step:
                self._write("duplicated_prefix_tokens", sum(repeated))
        self._steps.clear()

    def _write(self, name: str, value: float | None) -> None:
        if value is not None and self._trainer is not None:
            self._trainer._metrics["train"][f"dta/{name}"].append(value)


def _imbalance(values: Sequence[float]) -> float | None:
    """Largest over mean; None where there is nothing."""
    return max(values) * len(values) / sum(values) if sum(values) > 0 else None


def _window_loads(trainer: GRPOLike, batches: list[Inputs], merged: bool, cost: ModelCost) -> tuple[list[float], float]:
    """Per micro-batch its cost (the first one's is the whole tree's if they are merged), and tokens repeated."""
    micro_batches = [MicroBatch.from_inputs(batch, trainer.model) for batch in batches]
    joint = compared(micro_batches, trainer.model)
    costs = SequenceCosts.from_sequences(joint.sequences, cost, joint.prompt_lengths)
    if merged:
        return [costs.total] + [0.0] * (len(batches) - 1), 0.0
    rows = iter(range(len(joint)))
    bins = [[next(rows) for _ in batch.rows.sequences] for batch in micro_batches]
    tokens = SequenceCosts.from_sequences(joint.sequences, TOKENS)
    return loads(costs, bins), sum(loads(tokens, bins)) - tokens.total


def _of_all_ranks(value: list[list[float]]) -> list[list[list[float]]]:
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _predicted(step: _MicroStep) -> float:
    return step.predicted


def _measured(step: _MicroStep) -> float:
    return step.seconds


def _repeated(step: _MicroStep) -> float:
    return step.repeated


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        return ended - begun  # type: ignore[operator]
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000
