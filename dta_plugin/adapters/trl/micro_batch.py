"""TRL's padded rows and the package's sequences: one micro-batch in both forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.image_rows import image_rows
from dta_plugin.adapters.trl.images import RowImages, are_the_same
from dta_plugin.adapters.trl.token_weights import is_weighted
from dta_plugin.models.introspection import causal_lm
from dta_plugin.training.batch import RowBatch
from dta_plugin.training.image_rows import ImageRows, by_content
from dta_plugin.tree.cost import Padded


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """rows: as sequences, what of them runs. runs: bool [B, P + C], the same in TRL's layout.

    scored: bool [B, P + C]. columns: C. shape: what TRL's dense path runs. is_weighted: TRL's mask has weights and a
    balance (see `token_weights`); rows end with their last scored token then, or with the image that it is in.
    images: per row, those of the tokens that run; None where no row has any.
    """

    rows: RowBatch
    runs: torch.Tensor
    scored: torch.Tensor
    columns: int
    shape: Padded
    is_weighted: bool
    images: list[RowImages] | None = None

    @classmethod
    def from_padded(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        columns: int,
        is_weighted: bool = False,
        images: ImageRows | None = None,
    ) -> MicroBatch:
        """input_ids, attention_mask: [B, P + C], prompts padded left, completions right. columns: C.

        is_weighted: the mask is one of weights, and its last column the balance. images: None where no row has any.
        """
        runs = attention_mask != 0
        scored = runs.clone()
        scored[:, :-columns] = False
        if is_weighted:
            scored[:, -1] = False
            runs[:, -columns:] = True  # a token without a weight runs, too, if one with a weight comes after it
            runs[:, -1] = False
        whole = rows = RowBatch.from_padded(input_ids, runs, columns)
        if is_weighted:
            masks = _masks(whole, scored[:, -columns:-1])
            rows = whole.up_to_last_read(masks)
        own: list[RowImages] | None = None
        if images is not None:  # a dense model runs all of a row: it takes images in the order of placeholders
            ends, own = images.up_to(whole.sequences, list(map(len, rows.sequences)))
            rows = whole.up_to(ends, masks) if is_weighted else rows
        elif is_weighted:
            lengths = torch.tensor([len(sequence) for sequence in rows.sequences], device=runs.device)
            runs = runs & (runs.cumsum(dim=1) <= lengths[:, None])
        width = input_ids.shape[1] - is_weighted
        has_padding = not bool(runs[:, :width].all())
        shape = Padded(len(runs), width, columns - is_weighted, has_padding)
        return cls(rows, runs, scored, columns, shape, is_weighted, own)

    @classmethod
    def from_inputs(cls, inputs: Inputs, model: nn.Module) -> MicroBatch:
        """As TRL's loss forms the rows of a buffered micro-batch. model: the trainer's, for its images."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = image_rows(model, inputs, ids)
        return cls.from_padded(ids, mask, inputs["completion_ids"].shape[1], is_weighted(inputs), images)

    def has_rows_of(self, other: MicroBatch) -> bool:
        """Whether the same tokens and images run, and the same are scored."""
        return self.rows.equals(other.rows) and are_the_same(self.images, other.images)

    @property
    def scored_tokens(self) -> int:
        return int(self.scored.sum())

    def scored_values(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Per-row values [len - 1] -> those of all scored tokens, one row after the other."""
        if self.rows.masks is not None:
            mask = torch.from_numpy(np.concatenate([mask[1:] for mask in self.rows.masks]))
            return torch.cat(values)[mask.to(self.scored.device)]
        counts = self.scored.sum(dim=1).tolist()
        return torch.cat([value[len(value) - count :] for value, count in zip(values, counts, strict=True)])

    def as_columns(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all scored tokens -> [B, C], 0 elsewhere."""
        padded = values.new_zeros(self.scored.shape).masked_scatter(self.scored, values)
        return padded[:, -self.columns :]

    def padded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What TRL's dense path is to run in place of what it was given: without the balance, and without weights."""
        if not self.is_weighted:
            return input_ids, attention_mask, self.columns
        return input_ids[:, :-1], self.runs[:, :-1].long(), self.columns - 1

    def without_balance(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Values [B, P + C] of all tokens, as they go with `padded`."""
        return values[:, :-1] if self.is_weighted and values is not None else values

    def only_scored(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """What the dense path gave for `padded`, in the columns that it was asked for; what is no matrix, as it is."""
        if not self.is_weighted or values is None or values.ndim != 2:
            return values
        return F.pad(values.where(self.scored[:, -self.columns : -1], 0.0), (0, 1))


def joined(micro_batches: list[MicroBatch]) -> RowBatch:
    """All rows of several micro-batches."""
    return RowBatch.joined([batch.rows for batch in micro_batches])


def joined_images(micro_batches: list[MicroBatch]) -> list[RowImages] | None:
    """Those of all rows; None where none has any."""
    if all(batch.images is None for batch in micro_batches):
        return None
    return [images for batch in micro_batches for images in batch.images or [None] * len(batch.rows)]


def compared(micro_batches: list[MicroBatch], model: nn.Module) -> RowBatch:
    """All rows, with what images show in place of their placeholders: what they share, and cost together."""
    rows, images = joined(micro_batches), joined_images(micro_batches)
    return rows if images is None else replace(rows, sequences=by_content(causal_lm(model), rows.sequences, images))


def _masks(rows: RowBatch, completions: torch.Tensor) -> list[np.ndarray]:
    """Per row, bool over its tokens. completions: bool [B, C] of those after its prompt."""
    pairs = zip(rows.prompt_lengths, completions.cpu().numpy(), strict=True)
    return [np.concatenate([np.zeros(length, dtype=bool), row]) for length, row in pairs]
