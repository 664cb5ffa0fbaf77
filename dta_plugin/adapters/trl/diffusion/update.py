"""One micro-step: losses that are back-propagated one by one, so that only one of their graphs is ever alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from dta_plugin.adapters.trl.protocols import DiffusionLike


def back_propagated(
    trainer: DiffusionLike, model: nn.Module, losses: Iterator[torch.Tensor], passes: int
) -> torch.Tensor:
    """Back-propagate every loss but the last, which is returned for the Trainer to do; its value is that of the sum.

    losses: at most `passes` scalars; a loss's forward runs when it is asked for. model: wrapped (DDP, FSDP). Gradients
    are reduced over ranks with the last loss alone, in the micro-batch in which the Trainer has them reduced. Without
    gradients (evaluation) nothing is back-propagated.
    """
    before = torch.zeros((), device=trainer.accelerator.device)
    if not torch.is_grad_enabled():
        return sum(losses, before)
    with _reduced_later(trainer, model):
        for loss in islice(losses, passes - 1):
            trainer.accelerator.backward(loss)
            before += loss.detach()
    last = next(losses, None)
    return before.requires_grad_() if last is None else last + before


def _reduced_later(trainer: DiffusionLike, model: nn.Module) -> AbstractContextManager[Any]:
    """Gradients of this context stay on their rank. Within the Trainer's own such context there is nothing to do.

    accelerate's context for FSDP2 ends with gradients being reduced again: nested, it would end the outer one, too.
    With `sync_each_batch` the user asks for gradients to be reduced (and sharded) after every backward pass.
    """
    state = trainer.accelerator.gradient_state
    if not state.sync_gradients or state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return trainer._defer_fsdp_gradient_reduction()
    return trainer.accelerator.no_sync(model)
