"""Dense execution: the unmodified model on one unpadded sequence at a time. The oracle, and the fallback.

Nothing of the tree path is used here: the model's own forward gives logits, torch's log-softmax the log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def dense_logprobs(
    model: nn.Module,
    sequences: Sequence[torch.Tensor],
    temperature: float | Sequence[float] = 1.0,
    return_entropy: bool = False,
    padding: int = 0,
    images: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Log-probs (and entropies in nats) of tokens 1.. of each sequence, [len - 1] each, in float32 or float64.

    sequences: int64 [len] on the model's device. temperature: of all, or one per sequence. padding: so many masked
    tokens in front of each. images: per sequence, what else the model's forward is to get; see `dense_inputs`.
    """
    logprobs, entropies = [], []
    temperatures = [temperature] * len(sequences) if isinstance(temperature, (int, float)) else temperature
    for sequence, own, more in zip(sequences, temperatures, images or [{}] * len(sequences), strict=True):
        inputs = {"input_ids": sequence[None]}
        if padding:
            real = torch.arange(padding + len(sequence), device=sequence.device) >= padding
            inputs = {"input_ids": nn.functional.pad(sequence, (padding, 0))[None], "attention_mask": real[None].long()}
        logits = model(**(inputs | dict(more)), use_cache=False).logits[0, padding:-1]
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / own).log_softmax(dim=-1)
        logprobs.append(log_p.gather(1, sequence[1:, None])[:, 0])
        if return_entropy:
            entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
    return logprobs, entropies if return_entropy else None
