"""What TRL hands to the loss of a micro-batch, as a diffusion LM reads it."""

from __future__ import annotations

from typing import Any

from dta_plugin.training.diffusion.batch import CANVAS_IDS, COMMIT_STEPS, DiffusionBatch, Rollout

MASK_SEEDS = "mask_seeds"  # key of TRL's buffered inputs: int64 [B], what each row's noise is drawn from


def diffusion_batch(inputs: dict[str, Any]) -> DiffusionBatch:
    """A truncated completion that TRL has masked out has length 0."""
    rollout = Rollout(inputs[CANVAS_IDS], inputs[COMMIT_STEPS]) if CANVAS_IDS in inputs else None
    return DiffusionBatch.from_padded(
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        inputs["completion_ids"],
        inputs["completion_mask"],
        inputs[MASK_SEEDS],
        rollout,
    )
