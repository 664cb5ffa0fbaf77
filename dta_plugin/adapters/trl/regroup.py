"""Siblings back into one micro-batch, without changing the gradient of any optimizer step.

TRL shuffles a generation batch row by row before it splits it into micro-batches, which tears groups apart. Within
the micro-batches of one accumulation window the order of rows does not matter to the summed gradient, so there (and
only there) rows are sorted by their tokens: siblings become neighbours. Row counts stay as they were.

The gradient would change where a loss normalises over the tokens of each micro-batch; those cases are named by
`composition_reason`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

Inputs = dict[str, Any]


def composition_reason(trainer: Any) -> str | None:
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


def regroup(buffer: list[Inputs], accumulation_steps: int) -> list[Inputs]:
    """Sort the rows of a generation batch within each accumulation window.

    buffer: micro-batches in the order of their steps, tensors [B, ...] padded alike. accumulation_steps: micro-batches
    per optimizer step. Returns micro-batches with the same number of rows each.
    """
    window = math.gcd(len(buffer), accumulation_steps)  # slots that always fall into the same optimizer step
    result: list[Inputs] = []
    for start in range(0, len(buffer), window):
        result.extend(_sorted_window(buffer[start : start + window]))
    return result


def _sorted_window(batches: list[Inputs]) -> list[Inputs]:
    if len(batches) == 1:
        return batches
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    order = _token_order(batches)
    merged = {key: _merge([batch[key] for batch in batches], order, sum(sizes)) for key in batches[0]}
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [
        {key: value[start:stop] if _has_rows(value, sum(sizes)) else value for key, value in merged.items()}
        for start, stop in pairwise(bounds)
    ]


def _token_order(batches: list[Inputs]) -> list[int]:
    """Row indices in lexicographic order of their real tokens."""
    keys: list[bytes] = []
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).cpu().numpy()
        real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool().cpu().numpy()
        keys.extend(row[keep].astype(">u4").tobytes() for row, keep in zip(ids, real, strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows


def _merge(values: list[Any], order: list[int], rows: int) -> Any:
    """Concatenate and reorder what has one entry per row; anything else is the same in every micro-batch."""
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim > 0:
        joined = torch.cat(values)
        return joined[torch.tensor(order, device=joined.device)] if joined.shape[0] == rows else first
    if isinstance(first, list):
        joined_list = [item for value in values for item in value]
        return [joined_list[i] for i in order] if len(joined_list) == rows else first
    return first
