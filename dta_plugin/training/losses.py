"""What a loss reads of a micro-batch, as traits: by them it is known which rows may move and which tokens need not run.

An adapter has a table from its framework's names of losses to traits. A loss that is not in it is `UNKNOWN`, and an
unknown loss allows nothing: its rows stay where they are, and all of their tokens run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTraits:
    """One loss, of log-probs, with an advantage per token.

    sums_over: which log-probs the term of one token reads: its own ("tokens"), those of its row ("rows"), or those of
    rows beside it ("batch"). A sum over tokens is estimated by weighted ones.
    without_advantage: what reads no log-prob once its advantage is 0: a token ("tokens"), a row of such tokens
    ("rows"), or nothing ("none"), as in a loss that also pulls towards an older policy.
    normalises_by: what its sums are divided by: numbers of the optimizer step, whatever a micro-batch holds ("step"),
    those of the micro-batch ("micro_batch"), or of its columns, padding too ("columns").
    """

    sums_over: Literal["tokens", "rows", "batch", "unknown"] = "unknown"
    without_advantage: Literal["tokens", "rows", "none"] = "none"
    normalises_by: Literal["step", "micro_batch", "columns", "unknown"] = "unknown"

    @property
    def is_known(self) -> bool:
        return self.sums_over != "unknown"

    @property
    def is_token_sum(self) -> bool:
        """Whether a random subset of tokens, weighted, gives the loss on average."""
        return self.sums_over == "tokens"

    @property
    def allows_moves(self) -> bool:
        """Whether a row's gradient is the same whatever rows share its micro-batch."""
        return self.sums_over in ("tokens", "rows") and self.normalises_by == "step"


UNKNOWN = LossTraits()


def traits_of(name: str, table: Mapping[str, LossTraits]) -> LossTraits:
    """Those of a loss by its framework's name; `UNKNOWN` where the table has none."""
    return table.get(name, UNKNOWN)


def tokens_read(mask: torch.Tensor, advantages: torch.Tensor, traits: LossTraits) -> torch.Tensor:
    """bool [S, C]: the tokens whose log-probs can change the gradient.

    mask: bool [S, C], tokens that carry loss. advantages: [S, C], or [S] of whole rows.
    """
    if traits.without_advantage == "none":
        return mask
    has_advantage = (advantages if advantages.ndim == 2 else advantages[:, None]) != 0
    if traits.without_advantage == "tokens":
        return mask & has_advantage
    return mask & (mask & has_advantage).any(dim=1, keepdim=True)
