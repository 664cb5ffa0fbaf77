"""Siblings back into one micro-batch, without changing the gradient of any optimizer step.

TRL shuffles a generation batch row by row before it splits it into micro-batches, which tears groups apart. Within
the micro-batches of one accumulation window the order of rows does not matter to the summed gradient, so there (and
only there) rows are dealt out anew: siblings together, micro-batches of like cost. Row counts stay as they were.

The gradient would change where a loss normalises over the tokens of each micro-batch; those cases are named by
`losses.composition_obstacle`.
"""

from __future__ import annotations

import math

from torch import nn

from dta_plugin.adapters.trl.generation_batch import Inputs, RowTable
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared
from dta_plugin.training.placement.micro_batches import to_micro_batches
from dta_plugin.tree.cost import ModelCost


def regroup(buffer: list[Inputs], accumulation_steps: int, cost: ModelCost, model: nn.Module) -> list[Inputs]:
    """Deal the rows of a generation batch out anew within each accumulation window.

    buffer: micro-batches in the order of their steps, tensors [B, ...] padded alike. accumulation_steps: micro-batches
    per optimizer step. cost: of the model's parts. model: the trainer's. Returns micro-batches with the same number of
    rows each.
    """
    window = math.gcd(len(buffer), accumulation_steps)  # slots that always fall into the same optimizer step
    result: list[Inputs] = []
    for start in range(0, len(buffer), window):
        result.extend(_regrouped(buffer[start : start + window], cost, model))
    return result


def _regrouped(batches: list[Inputs], cost: ModelCost, model: nn.Module) -> list[Inputs]:
    if len(batches) == 1:
        return batches
    table = RowTable.from_batches(batches)
    rows = compared([MicroBatch.from_inputs(batch, model) for batch in batches], model)
    bins = to_micro_batches(rows.sequences, rows.prompt_lengths, table.sizes, cost)
    return table.taken([row for members in bins for row in members]).batches()
