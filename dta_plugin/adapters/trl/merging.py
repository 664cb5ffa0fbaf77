"""Whether the micro-batches of an accumulation window are to run as one tree, where that is possible and pays."""

from __future__ import annotations

import logging

from dta_plugin.adapters.trl.foreign_hooks import window_reader
from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.window import window_size
from dta_plugin.balance.costs import TOKENS, SequenceCosts
from dta_plugin.config import TreeConfig
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.ranks import gathered, is_collective, is_fsdp1
from dta_plugin.models.introspection import causal_lm, input_device
from dta_plugin.training.notices import Notices
from dta_plugin.tree.cost import ModelCost

# One tree must save this share of what separate ones compute: it holds more activations at a time.
_WORTH = 0.05
# A tree that is streamed runs forward twice.
_STREAMED = 4 / 3


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
