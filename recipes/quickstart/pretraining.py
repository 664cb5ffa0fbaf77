"""Teach a quickstart's model what a base model knows: next-token training on whatever `batch` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel


def pretrain(
    model: PreTrainedModel, batch: Callable[[int], Mapping[str, torch.Tensor]], steps: int, peak_lr: float
) -> float:
    """AdamW with warm-up and linear decay; returns the last loss.

    batch: (step) -> what the model takes, labels included.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (steps - step) / (0.3 * steps), 1.0)
    )
    loss = torch.zeros(())
    for step in range(steps):
        loss = model(**batch(step), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
