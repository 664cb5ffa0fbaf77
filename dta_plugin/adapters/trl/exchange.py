"""Rows between ranks (`balance_ranks`): siblings that were generated apart meet, and every rank costs alike.

After a generation all ranks learn the token ids of all rows and come to the same plan. A row stays in its optimizer
step, every rank keeps its number of rows, and what moves takes all of its per-row tensors and its images along. TRL
divides by counts of rows or by sums over all ranks, so the gradient of the step stays; where a loss looks at what a
rank holds, nothing moves. Two collectives per generation: token ids, and the rows that move; one more for images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import distributed

from dta_plugin.adapters.trl.foreign_hooks import window_reader
from dta_plugin.adapters.trl.generation_batch import PADDING, Inputs, RowTable, row_obstacle
from dta_plugin.adapters.trl.losses import composition_obstacle, counts_padding
from dta_plugin.adapters.trl.micro_batch import MicroBatch, compared
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.transfer import ImageShape, Moves, Shape, as_trl_has_it, moved, of_tensors
from dta_plugin.balance.costs import TOKENS, SequenceCosts, loads
from dta_plugin.decline import Decline
from dta_plugin.training.placement.ranks import to_ranks
from dta_plugin.tree.cost import ModelCost


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """What a rank tells the others about its rows. obstacle: why they cannot move; then there is nothing else.

    cost: what the rank weighs trees by; all plan with that of the first one. images: of values of images, how many
    entries each row has, and what one of them is.
    """

    obstacle: str | None
    cost: ModelCost
    sequences: list[np.ndarray] = field(default_factory=list)
    first_scored: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    images: dict[str, ImageShape] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Exchanged:
    """buffer: this rank's micro-batches. repeated: per window, prefix tokens that several ranks compute."""

    buffer: list[Inputs]
    repeated: list[float]


def exchange(
    trainer: GRPOLike,
    buffer: list[Inputs],
    window: int,
    cost: ModelCost,
    prune: Callable[[list[Inputs]], list[Inputs]],
) -> Exchanged | Decline:
    """Move rows between ranks, or say why not; all ranks must call it, with as many micro-batches per `window`.

    prune: gives the rows as they will run, which is what they cost.
    """
    offers = _gathered(_offer(trainer, buffer, cost, prune))
    obstacle = next((offer.obstacle for offer in offers if offer.obstacle), None) or _mismatch(offers)
    if obstacle is not None:
        return Decline(obstacle)
    table = of_tensors(RowTable.from_batches(buffer))
    bounds = np.cumsum([0, *table.sizes])[::window].tolist()
    destination = np.empty((len(offers), len(table)), dtype=np.int64)
    repeated = []
    for start, stop in pairwise(bounds):
        destination[:, start:stop], tokens = _window_plan(offers, start, stop)
        repeated.append(tokens)
    rank = trainer.accelerator.process_index
    if (destination != np.arange(len(offers))[:, None]).any():
        padding = PADDING | dict.fromkeys(("prompt_ids", "completion_ids"), _pad_token(trainer))
        moves = Moves(rank, destination, bounds)
        table = moved(table, moves, _common_shapes(offers), padding, [offer.images for offer in offers])
    return Exchanged(as_trl_has_it(table).batches(), repeated)


def _gathered(offer: _Offer) -> list[_Offer]:
    offers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(offers, offer)
    return offers


def _offer(
    trainer: GRPOLike, buffer: list[Inputs], cost: ModelCost, prune: Callable[[list[Inputs]], list[Inputs]]
) -> _Offer:
    obstacle = _obstacle(trainer, buffer)
    if obstacle is not None:
        return _Offer(obstacle, cost)
    table = of_tensors(RowTable.from_batches(buffer))
    foreign = [key for key, value in table.per_row.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        return _Offer(f"{foreign[0]} is no tensor", cost)
    rows = compared([MicroBatch.from_inputs(batch, trainer.model) for batch in prune(buffer)], trainer.model)
    shapes: dict[str, Shape] = {key: (value.dtype, tuple(value.shape[1:])) for key, value in table.per_row.items()}  # type: ignore[union-attr]
    images = {
        key: ImageShape((parts[0].dtype, tuple(parts[0].shape[1:])), list(map(len, parts)))
        for key, parts in table.per_image.items()
    }
    sequences = [row.astype(np.int32) for row in rows.sequences]
    return _Offer(None, cost, sequences, rows.prompt_lengths, table.sizes, shapes, images)


def _obstacle(trainer: GRPOLike, buffer: list[Inputs]) -> str | None:
    """Why rows of this trainer cannot move to another rank."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        return "ranks share rows by tensor, context or sequence parallelism"
    if counts_padding(trainer):
        return "loss_type='luspo' depends on each rank's padding before TRL 1.10"
    return row_obstacle(buffer) or window_reader(trainer) or composition_obstacle(trainer)


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
    if extra:
        return f"{min(extra)} is not there on every rank"
    entries = [{key: images.entry for key, images in offer.images.items()} for offer in offers]
    differ = [key for key in sorted(set().union(*entries)) if len({own.get(key) for own in entries}) > 1]
    return f"{differ[0]} of images is of different kinds on different ranks" if differ else None


def _window_plan(offers: list[_Offer], start: int, stop: int) -> tuple[np.ndarray, float]:
    """Rows [start, stop) of all ranks: where each goes, int [ranks, rows], and the tokens that ranks then repeat."""
    sequences = [row for offer in offers for row in offer.sequences[start:stop]]
    first_scored = [first for offer in offers for first in offer.first_scored[start:stop]]
    owner = np.repeat(np.arange(len(offers)), stop - start)
    destination = np.array(to_ranks(sequences, first_scored, owner.tolist(), offers[0].cost))
    tokens = SequenceCosts.from_sequences(sequences, TOKENS)
    separate = loads(tokens, [np.flatnonzero(destination == rank).tolist() for rank in range(len(offers))])
    return destination.reshape(len(offers), -1), sum(separate) - tokens.total


def _common_shapes(offers: list[_Offer]) -> dict[str, Shape]:
    """Per key the widest row; all but the first dimension agree."""
    return {key: (dtype, max(offer.shapes[key][1] for offer in offers)) for key, (dtype, _) in offers[0].shapes.items()}


def _pad_token(trainer: GRPOLike) -> int:
    token = getattr(trainer, "pad_token_id", None)
    return int(token) if token is not None else int(getattr(trainer.processing_class, "pad_token_id", None) or 0)
