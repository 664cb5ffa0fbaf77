"""Rows of a table on their way to other ranks: per-row tensors as bytes of one width, images as bytes of their own.

Every rank knows from the offers what each row of each rank has, so nothing but the bytes is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed

from dta_plugin.adapters.trl.generation_batch import RowTable
from dta_plugin.adapters.trl.images import COUNTS, TOKEN_TYPES

Shape = tuple[torch.dtype, tuple[int, ...]]  # of one row, or of one entry of a row's images


class ImageShape(NamedTuple):
    """Of one value of images: what an entry is, and how many each row of a rank has."""

    entry: Shape
    entries: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Where rows go, and come from, as one rank sees it.

    destination: int [ranks, rows], of every row of every rank. bounds: where windows begin and end; a row stays in its.
    """

    rank: int
    destination: np.ndarray
    bounds: list[int]

    @property
    def stays(self) -> np.ndarray:
        return np.flatnonzero(self.destination[self.rank] == self.rank)

    @property
    def leaving(self) -> list[np.ndarray]:
        """Per rank, which of this rank's rows go there."""
        return [self._between(self.rank, other) for other in range(len(self.destination))]

    @property
    def arriving(self) -> list[np.ndarray]:
        """Per rank, which of its rows come here."""
        return [self._between(other, self.rank) for other in range(len(self.destination))]

    @property
    def order(self) -> np.ndarray:
        """How rows that stay, and then those that arrive, are to lie: by window, told by a row's place where it was."""
        place = np.concatenate([self.stays, *self.arriving])
        return np.argsort(np.searchsorted(self.bounds, place, side="right"), kind="stable")

    def _between(self, source: int, other: int) -> np.ndarray:
        rows = np.flatnonzero(self.destination[source] == other)
        return rows if source != other else rows[:0]


def of_tensors(table: RowTable) -> RowTable:
    """The same table with counts of images as tensors, and types of tokens apart for prompts and completions."""
    per_row: dict[str, Any] = dict(table.per_row)
    device, width = per_row["prompt_ids"].device, per_row["prompt_ids"].shape[1]
    for key in COUNTS:
        if key in per_row:
            per_row[key] = torch.tensor(per_row[key], device=device)
    for key in TOKEN_TYPES:
        if key in per_row:
            types = per_row.pop(key)
            per_row |= {f"prompt_{key}": types[:, :width], f"completion_{key}": types[:, width:]}
    return replace(table, per_row=per_row)


def as_trl_has_it(table: RowTable) -> RowTable:
    """The inverse of `of_tensors`."""
    per_row: dict[str, Any] = dict(table.per_row)
    for key in COUNTS:
        if key in per_row:
            per_row[key] = per_row[key].tolist()
    for key in TOKEN_TYPES:
        if f"prompt_{key}" in per_row:
            per_row[key] = torch.cat([per_row.pop(f"prompt_{key}"), per_row.pop(f"completion_{key}")], dim=1)
    return replace(table, per_row=per_row)


def moved(
    table: RowTable,
    moves: Moves,
    shapes: Mapping[str, Shape],
    padding: Mapping[str, int],
    images: Sequence[Mapping[str, ImageShape]],
) -> RowTable:
    """This rank's rows after the exchange; all ranks must call it.

    table: as `of_tensors` makes it. shapes: of one row, by key, the same on all ranks. padding: by key, what shorter
    rows are filled up with, where that is not 0. images: per rank, what its rows have of them.
    """
    cells = torch.cat([_cells(key, table.per_row[key], shapes[key], padding.get(key, 0)) for key in shapes], dim=1)
    sent = cells[torch.as_tensor(np.concatenate(moves.leaving), device=cells.device)]
    received = cells.new_empty((sum(map(len, moves.arriving)), cells.shape[1]))
    distributed.all_to_all_single(received, sent, list(map(len, moves.arriving)), list(map(len, moves.leaving)))
    whole = torch.cat([cells[torch.as_tensor(moves.stays, device=cells.device)], received])
    per_row = _values(whole[torch.as_tensor(moves.order, device=cells.device)], shapes)
    return replace(table, per_row=per_row, per_image=_moved_images(table, moves, images))


def _cells(key: str, value: Any, shape: Shape, fill: int) -> torch.Tensor:
    """A tensor [B, ...] padded to the common width, as uint8 [B, bytes]; prompts are padded left."""
    if value.ndim > 1:
        wide = value.new_full((len(value), *shape[1]), fill)
        first = wide.shape[1] - value.shape[1] if key.startswith("prompt_") else 0
        wide[:, first : first + value.shape[1]] = value
        value = wide
    return value.reshape(len(value), -1).contiguous().view(torch.uint8)


def _values(table: torch.Tensor, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor | list[Any]]:
    """The tensors [B, ...] of a table uint8 [B, bytes]."""
    values: dict[str, torch.Tensor | list[Any]] = {}
    start = 0
    for key, (dtype, shape) in shapes.items():
        stop = start + prod(shape) * dtype.itemsize
        values[key] = table[:, start:stop].contiguous().view(dtype).reshape(len(table), *shape)
        start = stop
    return values


def _moved_images(
    table: RowTable, moves: Moves, images: Sequence[Mapping[str, ImageShape]]
) -> dict[str, list[torch.Tensor]]:
    """Per value of images, the parts of this rank's rows after the exchange."""
    parts = {key: table.per_image[key] for key in sorted(table.per_image)}
    if not parts:
        return {}
    nothing = next(iter(parts.values()))[0].new_empty(0, dtype=torch.uint8)
    sent = torch.cat([nothing, *(_bytes(parts[key][row]) for row in np.concatenate(moves.leaving) for key in parts)])
    leaving = [_size(images[moves.rank], rows) for rows in moves.leaving]
    arriving = [_size(own, rows) for own, rows in zip(images, moves.arriving, strict=True)]
    received = sent.new_empty(sum(arriving))
    distributed.all_to_all_single(received, sent, arriving, leaving)
    found = {key: [parts[key][row] for row in moves.stays] for key in parts}
    start = 0
    for own, rows in zip(images, moves.arriving, strict=True):
        for row in rows:
            for key in parts:
                (dtype, shape), entries = own[key].entry, own[key].entries[row]
                stop = start + entries * prod(shape) * dtype.itemsize
                found[key].append(received[start:stop].clone().view(dtype).reshape(entries, *shape))
                start = stop
    return {key: [rows[i] for i in moves.order] for key, rows in found.items()}


def _size(images: Mapping[str, ImageShape], rows: np.ndarray) -> int:
    """Bytes of the images of some rows."""
    return sum(own.entries[row] * prod(own.entry[1]) * own.entry[0].itemsize for own in images.values() for row in rows)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)
