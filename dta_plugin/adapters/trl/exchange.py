"""Rows between ranks (`balance_ranks`): siblings that were generated apart meet, and every rank costs alike.

After a generation all ranks learn the token ids of all rows and come to the same plan. A row stays in its optimizer
step, every rank keeps its number of rows, and what moves takes all of its per-row tensors along. TRL divides by counts
of rows or by sums over all ranks, so the gradient of the step stays; where a loss looks at what a rank holds, nothing
moves. Two collectives per generation: token ids, and the rows that move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import distributed

from dta_plugin.adapters.trl.generation_batch import PADDING, Inputs, RowTable, has_images
from dta_plugin.adapters.trl.losses import composition_obstacle, counts_padding
from dta_plugin.adapters.trl.micro_batch import MicroBatch, joined
from dta_plugin.adapters.trl.origin import unknown_loss
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.balance.costs import TOKENS, SequenceCosts, loads
from dta_plugin.training.placement.ranks import to_ranks
from dta_plugin.tree.cost import ModelCost

Shape = tuple[torch.dtype, tuple[int, ...]]  # of one row


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """What a rank tells the others about its rows. obstacle: why they cannot move; then there is nothing else.

    model: what the rank weighs trees by; all plan with that of the first one.
    """

    obstacle: str | None
    model: ModelCost
    sequences: list[np.ndarray] = field(default_factory=list)
    first_scored: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Exchanged:
    """buffer: this rank's micro-batches. repeated: per window, prefix tokens that several ranks compute."""

    buffer: list[Inputs]
    repeated: list[float]


def exchange(
    trainer: GRPOLike,
    buffer: list[Inputs],
    window: int,
    model: ModelCost,
    prune: Callable[[list[Inputs]], list[Inputs]],
) -> Exchanged | str:
    """Move rows between ranks, or say why not; all ranks must call it, with as many micro-batches per `window`.

    prune: gives the rows as they will run, which is what they cost.
    """
    offers = _gathered(_offer(trainer, buffer, model, prune))
    obstacle = next((offer.obstacle for offer in offers if offer.obstacle), None) or _mismatch(offers)
    if obstacle is not None:
        return obstacle
    table = RowTable.from_batches(buffer)
    bounds = np.cumsum([0, *table.sizes])[::window].tolist()
    destination = np.empty((len(offers), len(table)), dtype=np.int64)
    repeated = []
    for start, stop in pairwise(bounds):
        destination[:, start:stop], tokens = _window_plan(offers, start, stop)
        repeated.append(tokens)
    rank = trainer.accelerator.process_index
    if (destination != np.arange(len(offers))[:, None]).any():
        table = _moved(table, destination, rank, bounds, _common_shapes(offers), _pad_token(trainer))
    return Exchanged(table.batches(), repeated)


def _gathered(offer: _Offer) -> list[_Offer]:
    offers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(offers, offer)
    return offers


def _offer(
    trainer: GRPOLike, buffer: list[Inputs], model: ModelCost, prune: Callable[[list[Inputs]], list[Inputs]]
) -> _Offer:
    obstacle = _obstacle(trainer, buffer)
    if obstacle is not None:
        return _Offer(obstacle, model)
    table = RowTable.from_batches(buffer)
    foreign = [key for key, value in table.per_row.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        return _Offer(f"{foreign[0]} is no tensor", model)
    rows = joined([MicroBatch.from_inputs(batch) for batch in prune(buffer)])
    shapes: dict[str, Shape] = {key: (value.dtype, tuple(value.shape[1:])) for key, value in table.per_row.items()}  # type: ignore[union-attr]
    return _Offer(
        None, model, [row.astype(np.int32) for row in rows.sequences], rows.prompt_lengths, table.sizes, shapes
    )


def _obstacle(trainer: GRPOLike, buffer: list[Inputs]) -> str | None:
    """Why rows of this trainer cannot move to another rank."""
    if has_images(buffer):
        return "images do not move"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        return "ranks share rows by tensor, context or sequence parallelism"
    if counts_padding(trainer):
        return "loss_type='luspo' depends on each rank's padding before TRL 1.10"
    return unknown_loss(trainer) or composition_obstacle(trainer)


def _mismatch(offers: list[_Offer]) -> str | None:
    """Why the rows of some ranks do not fit the others."""
    first = offers[0]
    if any(offer.sizes != first.sizes for offer in offers):
        return "ranks have different numbers of rows"
    for key, (dtype, shape) in first.shapes.items():
        others = [offer.shapes.get(key) for offer in offers]
        if all(other == (dtype, shape) for other in others):
            continue
        if any(other is None or other[0] != dtype or other[1][1:] != shape[1:] for other in others):
            return f"{key} is of different kinds on different ranks"
        aligned = "prompt_ids" if key.startswith("prompt_") else "completion_ids"
        if any(offer.shapes[key][1][:1] != offer.shapes[aligned][1] for offer in offers):
            return f"{key} has different widths on different ranks, which are not those of {aligned}"
    extra = set().union(*(offer.shapes for offer in offers)) - set(first.shapes)
    return f"{min(extra)} is not there on every rank" if extra else None


def _window_plan(offers: list[_Offer], start: int, stop: int) -> tuple[np.ndarray, float]:
    """Rows [start, stop) of all ranks: where each goes, int [ranks, rows], and the tokens that ranks then repeat."""
    sequences = [row for offer in offers for row in offer.sequences[start:stop]]
    first_scored = [first for offer in offers for first in offer.first_scored[start:stop]]
    owner = np.repeat(np.arange(len(offers)), stop - start)
    destination = np.array(to_ranks(sequences, first_scored, owner.tolist(), offers[0].model))
    tokens = SequenceCosts.from_sequences(sequences, TOKENS)
    separate = loads(tokens, [np.flatnonzero(destination == rank).tolist() for rank in range(len(offers))])
    return destination.reshape(len(offers), -1), sum(separate) - tokens.total


def _common_shapes(offers: list[_Offer]) -> dict[str, Shape]:
    """Per key the widest row; all but the first dimension agree."""
    return {key: (dtype, max(offer.shapes[key][1] for offer in offers)) for key, (dtype, _) in offers[0].shapes.items()}


def _pad_token(trainer: GRPOLike) -> int:
    token = getattr(trainer, "pad_token_id", None)
    return int(token) if token is not None else int(getattr(trainer.processing_class, "pad_token_id", None) or 0)


def _moved(
    table: RowTable, destination: np.ndarray, rank: int, bounds: list[int], shapes: dict[str, Shape], pad_token: int
) -> RowTable:
    """This rank's rows after the exchange. destination: int [ranks, rows]. bounds: where windows begin and end."""
    padding = PADDING | {"prompt_ids": pad_token, "completion_ids": pad_token}
    cells = torch.cat([_bytes(key, table.per_row[key], shapes[key], padding.get(key, 0)) for key in shapes], dim=1)
    ranks = range(len(destination))
    leaving = [np.flatnonzero(destination[rank] == other) if other != rank else np.empty(0, int) for other in ranks]
    arriving = [np.flatnonzero(destination[other] == rank) if other != rank else np.empty(0, int) for other in ranks]
    sent = cells[torch.as_tensor(np.concatenate(leaving), device=cells.device)]
    received = cells.new_empty((sum(map(len, arriving)), cells.shape[1]))
    distributed.all_to_all_single(received, sent, [len(x) for x in arriving], [len(x) for x in leaving])
    stays = np.flatnonzero(destination[rank] == rank)
    place = np.concatenate([stays, *arriving])  # a row's place on the rank that it comes from tells its window
    order = np.argsort(np.searchsorted(bounds, place, side="right"), kind="stable")
    whole = torch.cat([cells[torch.as_tensor(stays, device=cells.device)], received])
    return RowTable(_values(whole[torch.as_tensor(order, device=cells.device)], shapes), table.constant, table.sizes)


def _bytes(key: str, value: Any, shape: Shape, fill: int) -> torch.Tensor:
    """A tensor [B, ...] padded to the common width, as uint8 [B, bytes]; prompts are padded left."""
    if value.ndim > 1:
        wide = value.new_full((len(value), *shape[1]), fill)
        first = wide.shape[1] - value.shape[1] if key.startswith("prompt_") else 0
        wide[:, first : first + value.shape[1]] = value
        value = wide
    return value.reshape(len(value), -1).contiguous().view(torch.uint8)


def _values(table: torch.Tensor, shapes: dict[str, Shape]) -> dict[str, torch.Tensor | list[Any]]:
    """The tensors [B, ...] of a table uint8 [B, bytes]."""
    values: dict[str, torch.Tensor | list[Any]] = {}
    start = 0
    for key, (dtype, shape) in shapes.items():
        stop = start + prod(shape) * dtype.itemsize
        values[key] = table[:, start:stop].contiguous().view(dtype).reshape(len(table), *shape)
        start = stop
    return values
