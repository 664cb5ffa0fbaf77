"""The rows of a batch as sequences: what runs of them, where completions begin, which tokens a loss reads, and groups.

Frameworks lay rows out in their own ways, padded or jagged; here they are sequences without padding. `up_to_last_read`
is what an update runs that does not read all of its tokens: the model is causal, so what comes after the last token
that is read does not run either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.layout import Scored


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """S rows. sequences: int64 token ids that run, per row. prompt_lengths: per row, where its completion begins.

    masks: per sequence, bool over its tokens, which of them are scored; None: all of its completion.
    """

    sequences: list[np.ndarray]
    prompt_lengths: list[int]
    masks: list[np.ndarray] | None = None

    @classmethod
    def from_padded(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int) -> RowBatch:
        """input_ids, attention_mask: [S, P + C], prompts padded left, completions right. columns: C.

        Raises InvalidInputError for a row without a prompt token.
        """
        real = attention_mask != 0
        prompt_lengths = real[:, : real.shape[1] - columns].sum(dim=1).tolist()
        if min(prompt_lengths) < 1:
            raise InvalidInputError(
                f"Row {prompt_lengths.index(min(prompt_lengths))} has no prompt token. Expected at least one per row: "
                "the first completion token needs a token to be predicted from."
            )
        ids, mask = input_ids.cpu().numpy(), real.cpu().numpy()
        return cls([row[keep] for row, keep in zip(ids, mask, strict=True)], prompt_lengths)

    @classmethod
    def joined(cls, batches: Sequence[RowBatch]) -> RowBatch:
        """All rows of several batches, one batch after the other."""
        sequences = [sequence for batch in batches for sequence in batch.sequences]
        prompt_lengths = [length for batch in batches for length in batch.prompt_lengths]
        if all(batch.masks is None for batch in batches):
            return cls(sequences, prompt_lengths)
        return cls(sequences, prompt_lengths, [mask for batch in batches for mask in batch.scored_masks()])

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def scored(self) -> Scored:
        """Per sequence which tokens are scored, as `prepare_batch` takes it."""
        return self.prompt_lengths if self.masks is None else self.masks

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        return sum(map(len, self.sequences))

    @property
    def most_scored(self) -> int:
        """The most tokens from a completion's beginning to its row's end."""
        return max(0, *(len(row) - first for row, first in zip(self.sequences, self.prompt_lengths, strict=True)))

    @property
    def groups(self) -> list[int]:
        """A number per row, equal where prompts are: the rows of one prompt are a group."""
        numbers: dict[bytes, int] = {}
        rows = zip(self.sequences, self.prompt_lengths, strict=True)
        return [numbers.setdefault(row[:length].tobytes(), len(numbers)) for row, length in rows]

    def scored_masks(self) -> list[np.ndarray]:
        """Per sequence bool over its tokens, also where all of a completion is scored."""
        if self.masks is not None:
            return self.masks
        rows = zip(self.sequences, self.prompt_lengths, strict=True)
        return [np.arange(len(row)) >= length for row, length in rows]

    def up_to_last_read(self, masks: Sequence[np.ndarray]) -> RowBatch:
        """What runs if a loss reads some tokens only: each row up to the last of them, or its first token alone.

        masks: per row, bool over all of its tokens, which are read.
        """
        return self.up_to([int(mask.nonzero()[0].max(initial=0)) + 1 for mask in masks], masks)

    def up_to(self, ends: Sequence[int], masks: Sequence[np.ndarray]) -> RowBatch:
        """The first tokens of each row, of which these are read. ends: per row, how many. masks: as above."""
        return RowBatch(
            [row[:end] for row, end in zip(self.sequences, ends, strict=True)],
            self.prompt_lengths,
            [mask[:end] for mask, end in zip(masks, ends, strict=True)],
        )

    def equals(self, other: RowBatch) -> bool:
        """Whether the same tokens run and are scored."""
        return (
            self.prompt_lengths == other.prompt_lengths
            and all(map(np.array_equal, self.sequences, other.sequences))
            and all(map(np.array_equal, self.scored_masks(), other.scored_masks()))
        )
