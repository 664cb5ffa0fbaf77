"""The update of one micro-batch: losses that are back-propagated one by one, so that only one graph is ever alive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from dta_plugin.diffusion import DiffusionFamily
from dta_plugin.diffusion.objectives.bgpo import rows_that_count
from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import Statistics, run_statistics

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


@dataclass(eq=False)
class Objective(ABC):
    """What is maximised. An objective looks at those of the numbers that it has a use for.

    max_length: W, tokens of the longest completion that can be. epsilon: the clip range. beta: weight of the penalty.
    iterations: passes over a generation batch. sharing: of what the rows of a micro-step have in common.
    """

    options: DiffusionOptions
    family: DiffusionFamily
    autocast: Autocast
    max_length: int
    epsilon: float
    beta: float = 0.0
    iterations: int = 1
    sharing: PromptSharing = field(init=False)

    def __post_init__(self) -> None:
        self.sharing = PromptSharing(self.options.share_prompts)

    @property
    def passes(self) -> int:
        """Most losses of a micro-step."""
        return self.options.num_elbo_samples

    @abstractmethod
    def stored(self, model: nn.Module, batch: DiffusionBatch) -> torch.Tensor:
        """Of a policy that later ones are compared with, [B, ...]; without gradient."""

    @abstractmethod
    def update(self, model: nn.Module, step: MicroStep) -> Update: ...


class Update(ABC):
    """An objective at work on one micro-step: `losses` first, then `statistics` of what they have seen.

    advantages: [B], 0 in rows without a completion. counts: bool [B], the rows that add to the loss. seen: [B, ...],
    of the current policy what the objective has `stored` of others, 0 where a row did not run.
    """

    seen: torch.Tensor

    def __init__(self, objective: Objective, model: nn.Module, step: MicroStep) -> None:
        self.objective, self.model, self.step = objective, model, step
        objective.sharing.restart()
        self.lengths = step.batch.lengths
        self.advantages = step.advantages.masked_fill(self.lengths == 0, 0.0)
        self.counts = rows_that_count(self.advantages, step.reference is not None)

    @abstractmethod
    def losses(self) -> Iterator[torch.Tensor]:
        """The parts of the loss, each to be back-propagated before the next is asked for."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Of the rows that count, once `losses` has ended; not of one that runs only because other ranks wait."""

    def _see(self, values: torch.Tensor, *where: torch.Tensor | int) -> None:
        self.seen = self.seen.to(values.dtype)
        self.seen[where] = values.detach()

    def _common_statistics(self, d: torch.Tensor) -> Statistics:
        """What every objective tells. d: log-ratios, any shape, of the rows that count."""
        found = run_statistics(self.counts, self.lengths, d)
        found.sums |= self.objective.sharing.counts(self.objective.family)
        return found


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
