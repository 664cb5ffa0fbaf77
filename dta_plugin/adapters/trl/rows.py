"""TRL's padded rows and the package's sequences: one micro-batch in both forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import Padded


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """sequences: real token ids per row. first_scored: per row, its prompt tokens. completion: bool [B, P + C].

    columns: C. shape: what TRL's dense path runs.
    """

    sequences: list[np.ndarray]
    first_scored: list[int]
    completion: torch.Tensor
    columns: int
    shape: Padded

    @classmethod
    def from_padded(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int) -> MicroBatch:
        """input_ids, attention_mask: [B, P + C], prompts padded left, completions right. columns: C."""
        real = attention_mask.bool()
        completion = real.clone()
        completion[:, :-columns] = False
        ids, mask = input_ids.cpu().numpy(), real.cpu().numpy()
        sequences = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        shape = Padded(len(ids), ids.shape[1], columns, has_padding=not mask.all())
        return cls(sequences, _first_scored(real, completion), completion, columns, shape)

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> MicroBatch:
        """As TRL's loss forms the rows of a buffered micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return cls.from_padded(ids, mask, inputs["completion_ids"].shape[1])

    @property
    def scored_tokens(self) -> int:
        return int(self.completion.sum())

    def scored(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Per-row values [len - 1] -> those of all completions, one after the other."""
        counts = self.completion.sum(dim=1).tolist()
        return torch.cat([value[len(value) - count :] for value, count in zip(values, counts, strict=True)])

    def as_columns(self, scored: torch.Tensor) -> torch.Tensor:
        """Values of all completions -> [B, C], 0 at padding."""
        padded = scored.new_zeros(self.completion.shape).masked_scatter(self.completion, scored)
        return padded[:, -self.columns :]

    def equals(self, other: MicroBatch) -> bool:
        return self.first_scored == other.first_scored and all(map(np.array_equal, self.sequences, other.sequences))


def joined(micro_batches: list[MicroBatch]) -> tuple[list[np.ndarray], list[int]]:
    """All sequences, and where each one's completion begins."""
    sequences = [sequence for batch in micro_batches for sequence in batch.sequences]
    return sequences, [first for batch in micro_batches for first in batch.first_scored]


def _first_scored(real: torch.Tensor, completion: torch.Tensor) -> list[int]:
    """Per row, the number of prompt tokens: completions start there."""
    prompt_lengths = (real.sum(dim=1) - completion.sum(dim=1)).tolist()
    if min(prompt_lengths) < 1:
        raise InvalidInputError(
            f"Row {prompt_lengths.index(min(prompt_lengths))} has no prompt token. Expected at least one per row: the "
            "first completion token needs a token to be predicted from."
        )
    return prompt_lengths
