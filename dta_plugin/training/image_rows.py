"""The images of some rows as their placeholders have them: where a row may end, and which rows show the same.

Both ask which placeholder belongs to which image, as the model's config says (see `models.vision.units`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import ImageInputs, Unit, image_token_id, row_units, runs_of, stacked

# Numbers from here on stand for what an image shows; ids of tokens are below. All fit into int32.
_FIRST = 2**30


@dataclass(frozen=True, slots=True, eq=False)
class ImageRows:
    """rows: per row, its images. runs: per row, those of its placeholders, also where they do not run.

    model: the causal LM inside all wrappers; None if its images cannot come into a tree, so that rows run dense, whole.
    """

    rows: list[ImageInputs | None]
    runs: list[list[int]]
    model: PreTrainedModel | None

    @classmethod
    def of_whole(
        cls, model: PreTrainedModel, sequences: Sequence[np.ndarray], rows: list[ImageInputs | None]
    ) -> ImageRows:
        """Of rows all of which is in the sequences."""
        if images_obstacle(model) is not None:
            return cls(rows, [[] for _ in rows], None)
        return cls(rows, [runs_of(sequence == image_token_id(model)) for sequence in sequences], model)

    def by_content(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Beginnings of the rows with what images show in place of placeholders, see the function of this name."""
        if self.model is None:
            return list(sequences)
        return by_content(self.model, sequences, self.up_to(sequences, list(map(len, sequences)))[1])

    def up_to(self, sequences: Sequence[np.ndarray], ends: Sequence[int]) -> tuple[list[int], list[ImageInputs | None]]:
        """Where rows end that are to have so many tokens, and the images that they have then.

        sequences: int64 [len] per row, what runs of it. ends: per row, at most its length.

        An image that begins later is left out. One that begins before stays whole: its first tokens may attend to its
        last. Raises InvalidInputError for a row that does not run from the middle of an image on.
        """
        if self.model is None:
            return list(ends), self.rows
        found = [self._row_up_to(row, *each) for row, each in enumerate(zip(sequences, ends, strict=True))]
        return [end for end, _ in found], [images for _, images in found]

    def _row_up_to(self, row: int, sequence: np.ndarray, end: int) -> tuple[int, ImageInputs | None]:
        assert self.model is not None
        images, count = self.rows[row], sum(self.runs[row])
        if images is None:
            return end, None
        places = np.flatnonzero(sequence == image_token_id(self.model))
        if len(places) == count and (not count or places[-1] < end):
            return end, images
        units = row_units(self.model, images, self.runs[row])
        ends = np.cumsum([unit.tokens for unit in units])
        begun = np.append(0, ends[:-1]) < np.searchsorted(places, end)
        if not begun.any():
            return end, None
        last = int(ends[begun][-1])
        if last > len(places):
            raise InvalidInputError(
                f"The mask of row {row} hides {last - len(places)} tokens of an image whose others it shows. Expected "
                "images that are shown whole or not at all; see what the attention mask leaves out."
            )
        own = [unit for unit, has in zip(units, begun, strict=True) if has]
        return max(end, int(places[last - 1]) + 1), stacked(own)


def by_content(
    model: PreTrainedModel, sequences: Sequence[np.ndarray], images: Sequence[ImageInputs | None]
) -> list[np.ndarray]:
    """The sequences with a number for what an image shows in place of its placeholders, the same on all ranks.

    For what rows cost together, which depends on what they share. What then runs as one is compared in full.
    """
    is_image = [sequence == image_token_id(model) for sequence in sequences]
    units = [
        [] if own is None else row_units(model, own, runs_of(places))
        for own, places in zip(images, is_image, strict=True)
    ]
    numbers = iter(_numbers([unit for own in units for unit in own]))
    found = [sequence.copy() for sequence in sequences]
    for sequence, places, row in zip(found, is_image, units, strict=True):
        if row:
            sequence[places] = np.concatenate([np.full(unit.tokens, next(numbers)) for unit in row])
    return found


def _numbers(units: Sequence[Unit]) -> list[int]:
    """Per unit, a number by sums over what it shows. One transfer for all."""
    sums = [(value.double().sum(), value.double().norm()) for unit in units for value in unit.inputs.values()]
    if not sums:
        return []
    values = iter(torch.stack([number for pair in sums for number in pair]).tolist())
    parts = [[next(values) for _ in range(2 * len(unit.inputs))] for unit in units]
    return [_FIRST + crc32(struct.pack(f"{len(part)}d", *part)) % _FIRST for part in parts]
