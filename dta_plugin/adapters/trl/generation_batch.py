"""TRL's buffered micro-batches as one table of rows, and back.

TRL hands out a generation batch as a list of dicts: tensors or lists with one entry per row, values of images, as many
as a row has (see `images`), and values that are the same in every micro-batch (`num_items_in_batch`). Rows change
places here, whole; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from dta_plugin.adapters.trl.images import VALUES, entries_of_rows, layout_obstacle

Inputs = dict[str, Any]
# What TRL pads with, where that is not 0. Some losses sum over padding.
PADDING = {"tool_mask": 1, "importance_sampling_ratio": 1}


def row_obstacle(buffer: Sequence[Inputs]) -> str | None:
    """Why rows cannot change places: beside images, what it is not known of which row it belongs to."""
    for batch in buffer:
        obstacle = layout_obstacle(batch)
        if obstacle is not None:
            return f"the batch has {obstacle}"
        if batch.get("pixel_values") is None:
            continue
        rows = len(batch["prompt_ids"])
        for key, value in batch.items():
            is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
            if is_tensor and key not in VALUES and not _has_rows(value, rows):
                return f"of {key}, which is beside images, it is not known which row it belongs to"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """per_row: values with one entry per row. per_image: of images, a tensor per row with as many as it has.

    constant: the others. sizes: rows of each micro-batch.
    """

    per_row: dict[str, torch.Tensor | list[Any]]
    per_image: dict[str, list[torch.Tensor]]
    constant: Inputs
    sizes: list[int]

    @classmethod
    def from_batches(cls, batches: Sequence[Inputs]) -> RowTable:
        """batches: micro-batches with the same keys, tensors [B, ...] padded alike."""
        sizes = [len(batch["prompt_ids"]) for batch in batches]
        entries = [entries_of_rows(batch) for batch in batches]
        per_row, per_image, constant = {}, {}, {}
        for key, first in batches[0].items():
            values = [batch[key] for batch in batches]
            if key in entries[0]:
                parts = [value.split(of_rows[key]) for value, of_rows in zip(values, entries, strict=True)]
                per_image[key] = [part for of_batch in parts for part in of_batch]
            elif all(map(_has_rows, values, sizes)):
                per_row[key] = _concatenated(values)
            else:
                constant[key] = first
        return cls(per_row, per_image, constant, sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def taken(self, order: Sequence[int]) -> RowTable:
        """The same rows in another order."""
        return replace(
            self,
            per_row={key: _taken(value, order) for key, value in self.per_row.items()},
            per_image={key: [parts[row] for row in order] for key, parts in self.per_image.items()},
        )

    def batches(self) -> list[Inputs]:
        bounds = pairwise([0, *accumulate(self.sizes)])
        return [
            {key: value[a:b] for key, value in self.per_row.items()}
            | {key: torch.cat(parts[a:b]) for key, parts in self.per_image.items()}
            | self.constant
            for a, b in bounds
        ]


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows


def _concatenated(values: list[Any]) -> torch.Tensor | list[Any]:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]


def _taken(value: torch.Tensor | list[Any], order: Sequence[int]) -> torch.Tensor | list[Any]:
    if isinstance(value, torch.Tensor):
        return value[torch.as_tensor(order, device=value.device)]
    return [value[i] for i in order]
