"""DiffusionBatch: prompts and completions as a diffusion LM reads them, and the seeds of their noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.training.padding import side_by_side

# Names under which frameworks carry the parts of a Rollout.
CANVAS_IDS, COMMIT_STEPS = "canvas_ids", "commit_steps"


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """How completions came about: `canvas_ids` and `steps` of `SampledCompletions`, int64 [B, G]."""

    canvas_ids: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionBatch:
    """B prompts [B, P] (padded left) and completions [B, C] (padded right), side by side.

    input_ids, attention_mask: int64 [B, P + C]. width: C. seeds: int64 [B], what each row's noise is drawn from.
    rollout: for the objective that reads it, else None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    width: int
    seeds: torch.Tensor
    rollout: Rollout | None = None

    @classmethod
    def from_padded(
        cls,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        seeds: torch.Tensor,
        rollout: Rollout | None = None,
    ) -> DiffusionBatch:
        """Of rectangles [B, P] and [B, C] with their attention masks."""
        return cls(
            torch.cat([prompt_ids, completion_ids], dim=1),
            torch.cat([prompt_mask, completion_mask], dim=1),
            completion_ids.shape[1],
            seeds,
            rollout,
        )

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[np.ndarray],
        begins: Sequence[int],
        seeds: Sequence[int],
        pad: int,
        device: torch.device | None = None,
        rollout: Rollout | None = None,
    ) -> DiffusionBatch:
        """Of rows without padding; begins: where each one's completion begins."""
        ids, mask = side_by_side(sequences, begins, pad)
        drawn = torch.tensor(seeds, dtype=torch.int64, device=device)
        return cls(ids.to(device=device), mask.to(device=device), ids.shape[1] - max(begins), drawn, rollout)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [B]: tokens of each completion; 0 where all of it is masked out."""
        return self.attention_mask[:, -self.width :].sum(dim=1)

    def chunks(self, size: int) -> list[DiffusionBatch]:
        """The same rows, at most so many at a time."""
        parts = [slice(first, first + size) for first in range(0, len(self), size)]
        own = self.rollout
        return [
            DiffusionBatch(
                self.input_ids[part],
                self.attention_mask[part],
                self.width,
                self.seeds[part],
                None if own is None else Rollout(own.canvas_ids[part], own.steps[part]),
            )
            for part in parts
        ]


def draw_seeds(count: int, device: torch.device) -> torch.Tensor:
    """int64 [count] from torch's CPU generator; for who keeps them beside the rows."""
    return torch.randint(2**62, (count,), dtype=torch.int64).to(device)


def content_seed(tokens: np.ndarray, begin: int, step: int) -> int:
    """From a row's tokens and `step` alone: the same in every pass, micro-batch and rank; for who cannot keep seeds.

    step: how often the policy's rollouts have been trained on; it makes the noise of a row that comes again new.
    """
    content = np.concatenate([np.array([step, begin]), tokens]).astype("<i8")
    return int.from_bytes(hashlib.blake2b(content.tobytes(), digest_size=7).digest(), "little")
