"""Siblings back side by side in TRL's buffered micro-batches, so that they share their prompt in the update.

TRL shuffles a generation batch row by row before it splits it. The loss here is a mean over the rows of an optimizer
step, each with its own noise: which micro-batch a row is in changes no gradient, as long as the step is the same.
"""

from __future__ import annotations

import math

from dta_plugin.adapters.trl.generation_batch import Inputs, RowTable


def siblings_together(buffer: list[Inputs], accumulation_steps: int) -> list[Inputs]:
    """Micro-batches of as many rows each, in which rows of one prompt follow each other.

    buffer: micro-batches in the order of their steps, tensors [B, ...] padded alike. accumulation_steps: micro-batches
    per optimizer step. Rows stay in their optimizer step.
    """
    window = math.gcd(len(buffer), accumulation_steps)
    result: list[Inputs] = []
    for start in range(0, len(buffer), window):
        table = RowTable.from_batches(buffer[start : start + window])
        first_of: dict[tuple[int, ...], int] = {}
        prompts = [tuple(row) for row in table.per_row["prompt_ids"].tolist()]  # type: ignore[union-attr]
        group = [first_of.setdefault(prompt, row) for row, prompt in enumerate(prompts)]
        result.extend(table.taken(sorted(range(len(table)), key=group.__getitem__)).batches())
    return result
