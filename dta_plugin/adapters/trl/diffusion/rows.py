"""The rows of a micro-batch or of a generation batch, as the update reads them out of TRL's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MASK_SEEDS = "mask_seeds"  # key of TRL's buffered inputs: int64 [B], what each row's noise is drawn from


def draw_seeds(count: int, device: torch.device) -> torch.Tensor:
    """int64 [count] from torch's CPU generator, which TRL seeds per rank and checkpoints restore."""
    return torch.randint(2**62, (count,), dtype=torch.int64).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Prompts [B, P] (left padded) and completions [B, C] (right padded), side by side.

    input_ids, attention_mask: int64 [B, P + C]. width: C. seeds: int64 [B], of the noise.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    width: int
    seeds: torch.Tensor

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> Rows:
        """Of the inputs that TRL hands to the loss."""
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            inputs[MASK_SEEDS],
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [B]: tokens of each completion; 0 where TRL has masked out a truncated one."""
        return self.attention_mask[:, -self.width :].sum(dim=1)

    def chunks(self, size: int) -> list[Rows]:
        """The same rows, at most so many at a time."""
        parts = zip(self.input_ids.split(size), self.attention_mask.split(size), self.seeds.split(size), strict=True)
        return [Rows(ids, mask, self.width, seeds) for ids, mask, seeds in parts]


@dataclass(frozen=True, slots=True, eq=False)
class MicroStep:
    """What one micro-step is about.

    advantages: float32 [B]. old, reference: what an objective has `stored` of the policy that generated and of the
    reference, [B, ...], or None. iteration: which pass over the generation batch. scale: factor of the loss, one over
    the number of accumulated micro-batches. always_run: at least one row, at weight 0 if need be: other ranks wait for
    this one's calls of the model, or the gradient scaler for a gradient.
    """

    rows: Rows
    advantages: torch.Tensor
    old: torch.Tensor | None
    reference: torch.Tensor | None
    iteration: int
    scale: float
    always_run: bool
