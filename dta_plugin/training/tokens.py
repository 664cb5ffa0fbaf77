"""The tokens that an update draws, of those that its loss reads (NAT, see `token_selection`), as weights.

A sum over tokens is on average what it was if each is multiplied by its weight. Where weights are put so that a loss
sees them is the adapter's business; what has none does not run (`RowBatch.up_to_last_read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dta_plugin.token_selection.select import TokenSelection, draw


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTokens:
    """weights: float32 [S, C], 0 where a token was not drawn or carries no loss. has_all: each was drawn, at weight 1.

    metrics: of the drawing (see `Drawn.statistics`), by their names in `training.metrics`; none where no token carries
    loss.
    """

    weights: torch.Tensor
    has_all: bool
    metrics: dict[str, float]


def draw_tokens(
    selection: TokenSelection, carries: torch.Tensor, groups: Sequence[int], *, seed: int, step: int, rank: int
) -> DrawnTokens:
    """Draw once. carries: bool [S, C], tokens that carry loss. groups: a number per row, equal for siblings.

    seed, step, rank: the same numbers draw the same.
    """
    drawn = draw(selection, carries.cpu().numpy(), groups, seed=seed, step=step, rank=rank)
    metrics = {f"dta/{name}": value for name, value in drawn.statistics().items()}
    has_all = not (drawn.weights[drawn.carries_loss] != 1.0).any()
    return DrawnTokens(torch.from_numpy(drawn.weights).to(carries.device, torch.float32), has_all, metrics)
