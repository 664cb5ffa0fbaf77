"""Siblings back into one micro-batch, without changing the gradient of any optimizer step.

TRL shuffles a generation batch row by row before it splits it into micro-batches, which tears groups apart. Within
the micro-batches of one accumulation window the order of rows does not matter to the summed gradient, so there (and
only there) rows are dealt out anew: siblings together, micro-batches of like cost. Row counts stay as they were.

The gradient would change where a loss normalises over the tokens of each micro-batch; those cases are named by
`composition_reason`.
"""

from __future__ import annotations

import math

from dta_plugin.adapters.trl.buffer import Inputs, Rows
from dta_plugin.adapters.trl.deal import to_micro_batches
from dta_plugin.adapters.trl.rows import MicroBatch, joined
from dta_plugin.tree.cost import ModelCost


def composition_reason(trainer: object) -> str | None:
    """Why a row's gradient depends on which rows share its micro-batch, or None if it does not."""
    if getattr(trainer, "loss_type", None) == "bnpo":
        return "loss_type='bnpo' normalises over each micro-batch"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return "top_entropy_quantile is taken over each micro-batch"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the entropy bonus is a mean over each micro-batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss is computed over each micro-batch"
    return None


def regroup(buffer: list[Inputs], accumulation_steps: int, model: ModelCost) -> list[Inputs]:
    """Deal the rows of a generation batch out anew within each accumulation window.

    buffer: micro-batches in the order of their steps, tensors [B, ...] padded alike. accumulation_steps: micro-batches
    per optimizer step. model: what the model's parts cost. Returns micro-batches with the same number of rows each.
    """
    window = math.gcd(len(buffer), accumulation_steps)  # slots that always fall into the same optimizer step
    result: list[Inputs] = []
    for start in range(0, len(buffer), window):
        result.extend(_regrouped(buffer[start : start + window], model))
    return result


def _regrouped(batches: list[Inputs], model: ModelCost) -> list[Inputs]:
    if len(batches) == 1:
        return batches
    rows = Rows.of(batches)
    sequences, first_scored = joined([MicroBatch.from_inputs(batch) for batch in batches])
    bins = to_micro_batches(sequences, first_scored, rows.sizes, model)
    return rows.taken([row for members in bins for row in members]).batches()
