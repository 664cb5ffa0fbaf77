"""TRL's padded rows and the package's sequences: one micro-batch in both forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dta_plugin.adapters.trl.weights import is_weighted
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import Padded


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """sequences: token ids per row that run, `runs` [B, P + C]. prompt_lengths: per row, where its completion begins.

    scored: bool [B, P + C]. columns: C. shape: what TRL's dense path runs. is_weighted: TRL's mask has weights and a
    balance (see `weights`); sequences end with their last scored token then, and one without any is its first token.
    """

    sequences: list[np.ndarray]
    prompt_lengths: list[int]
    runs: torch.Tensor
    scored: torch.Tensor
    columns: int
    shape: Padded
    is_weighted: bool

    @classmethod
    def from_padded(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int, is_weighted: bool = False
    ) -> MicroBatch:
        """input_ids, attention_mask: [B, P + C], prompts padded left, completions right. columns: C.

        is_weighted: the mask is one of weights, and its last column the balance.
        """
        runs = attention_mask != 0
        scored = runs.clone()
        scored[:, :-columns] = False
        width = input_ids.shape[1]
        if is_weighted:
            scored[:, -1] = False
            runs, width = _up_to_last(runs, scored, columns), width - 1
        ids, mask = input_ids.cpu().numpy(), runs.cpu().numpy()
        sequences = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        shape = Padded(len(ids), width, columns - is_weighted, has_padding=not mask[:, :width].all())
        return cls(sequences, _prompt_lengths(runs, columns), runs, scored, columns, shape, is_weighted)

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> MicroBatch:
        """As TRL's loss forms the rows of a buffered micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return cls.from_padded(ids, mask, inputs["completion_ids"].shape[1], is_weighted(inputs))

    @property
    def scored_tokens(self) -> int:
        return int(self.scored.sum())

    @property
    def wanted(self) -> Sequence[int | np.ndarray]:
        """Per sequence which tokens are scored, as `prepare` takes it."""
        return self._masks() if self.is_weighted else self.prompt_lengths

    def _masks(self) -> list[np.ndarray]:
        completions = self.scored[:, -self.columns :].cpu().numpy()
        masks = zip(self.sequences, self.prompt_lengths, completions, strict=True)
        return [np.insert(row[: len(seq) - prompt], 0, [False] * prompt) for seq, prompt, row in masks]

    def scored_values(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Per-row values [len - 1] -> those of all scored tokens, one row after the other."""
        if self.is_weighted:
            mask = torch.from_numpy(np.concatenate([mask[1:] for mask in self._masks()]))
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

    def only_scored(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """What the dense path gave for `padded`, in the columns that it was asked for; what is no matrix, as it is."""
        if not self.is_weighted or values is None or values.ndim != 2:
            return values
        return F.pad(values.where(self.scored[:, -self.columns : -1], 0.0), (0, 1))

    def equals(self, other: MicroBatch) -> bool:
        """Whether the same tokens run and are scored."""
        same_prompts = self.prompt_lengths == other.prompt_lengths
        same_counts = torch.equal(self.scored.sum(dim=1), other.scored.sum(dim=1))
        return same_prompts and same_counts and all(map(np.array_equal, self.sequences, other.sequences))


def joined(micro_batches: list[MicroBatch]) -> tuple[list[np.ndarray], list[int]]:
    """All sequences, and where each one's completion begins."""
    sequences = [sequence for batch in micro_batches for sequence in batch.sequences]
    return sequences, [length for batch in micro_batches for length in batch.prompt_lengths]


def _up_to_last(real: torch.Tensor, scored: torch.Tensor, columns: int) -> torch.Tensor:
    """Bool [B, P + C]: real tokens up to each row's last scored one, and the first token of rows without any."""
    from_here_on = scored.flip(1).cumsum(1).flip(1) > 0
    is_prompt = torch.arange(real.shape[1], device=real.device) < real.shape[1] - columns
    live = from_here_on & (real | ~is_prompt)
    first = real & (real.cumsum(1) == 1)
    return torch.where(scored.any(dim=1, keepdim=True), live, first)


def _prompt_lengths(real: torch.Tensor, columns: int) -> list[int]:
    """Per row, the number of prompt tokens: completions start there."""
    lengths = real[:, :-columns].sum(dim=1).tolist()
    if min(lengths) < 1:
        raise InvalidInputError(
            f"Row {lengths.index(min(lengths))} has no prompt token. Expected at least one per row: the "
            "first completion token needs a token to be predicted from."
        )
    return lengths
