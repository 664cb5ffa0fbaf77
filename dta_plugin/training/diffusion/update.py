"""The update of one micro-batch: losses that are back-propagated one by one, so that only one graph is ever alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn

from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.statistics import Statistics

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class MicroStep:
    """What one micro-step is about.

    advantages: float32 [B]. old, reference: what an objective has `stored` of the policy that generated and of the
    reference, [B, ...], or None. iteration: which pass over the generation batch. scale: factor of the loss, which is a
    mean over the rows, for micro-batches and ranks to add up. always_run: at least one row, at weight 0 if need be:
    other ranks wait for this one's calls of the model, or a gradient scaler for a gradient.
    """

    batch: DiffusionBatch
    advantages: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    iteration: int = 0
    scale: float = 1.0
    always_run: bool = False


class Update(Protocol):
    """An objective at work on one micro-step."""

    def losses(self) -> Iterator[torch.Tensor]:
        """The parts of the loss, each to be back-propagated before the next is asked for."""

    def statistics(self) -> Statistics:
        """Of what `losses` has seen, once it has ended: of rows that count, not of one that runs at weight 0."""


class Objective(Protocol):
    """What is maximised. passes: most losses of a micro-step. sharing: of what the rows of one have in common."""

    passes: int
    sharing: PromptSharing

    def stored(self, model: nn.Module, batch: DiffusionBatch) -> torch.Tensor:
        """Of a policy that later ones are compared with, [B, ...]; without gradient."""

    def update(self, model: nn.Module, step: MicroStep) -> Update: ...


def back_propagated(
    losses: Iterator[torch.Tensor],
    passes: int,
    backward: Callable[[torch.Tensor], object],
    reduced_later: AbstractContextManager[Any],
    device: torch.device,
) -> torch.Tensor:
    """Back-propagate every loss but the last, which is returned for the caller to do; its value is that of the sum.

    losses: at most `passes` scalars; a loss's forward runs when it is asked for. reduced_later: a context in which
    gradients stay on their rank: they are reduced with the last loss alone, where the caller has them reduced. Without
    gradients (evaluation) nothing is back-propagated.
    """
    before = torch.zeros((), device=device)
    if not torch.is_grad_enabled():
        return sum(losses, before)
    with reduced_later:
        for loss in islice(losses, passes - 1):
            backward(loss)
            before += loss.detach()
    last = next(losses, None)
    return before.requires_grad_() if last is None else last + before
