"""Hidden states -> edge log-probs and row entropies, by a model's LM head, whatever it is made of.

A head that is a weight and a bias goes through `TiledLogProbs` (tiled_logprobs.py), which never holds the logits of a
large batch; one with an adapter or quantised weights is called itself, tile by tile. One row can carry several edges: a
fork's last token is one softmax with one target per child.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from dta_plugin.dtypes import accumulation_dtype, compute_dtype
from dta_plugin.models.tiled_logprobs import Edges, LogitTransform, TiledLogProbs, row_tiles


@dataclass(frozen=True, slots=True)
class LMHead:
    """How a model turns hidden states into logits.

    module: the output embedding. logits = module(hidden) * scale, then ``softcap * tanh(logits / softcap)``.
    dtype: dtype of the projection, or None for the hidden states' own (autocast's where that is on).
    """

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None

    @property
    def is_plain(self) -> bool:
        """True if the module is just a weight and a bias: no adapter, no quantisation, no hooks but those of FSDP2."""
        if isinstance(self.module, FSDPModule):
            return type(self.module).__bases__[-1] is torch.nn.Linear
        hooked = self.module._forward_hooks or self.module._forward_pre_hooks
        return type(self.module) is torch.nn.Linear and not hooked

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Unfused logits [..., V] in float32 (float64 for float64 models): what the model's own forward returns."""
        raw = self.module(hidden if self.dtype is None else hidden.to(self.dtype))
        raw = raw.to(accumulation_dtype(raw.dtype)) * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def edge_logprobs(
    hidden: torch.Tensor,
    head: LMHead,
    targets: torch.Tensor,
    row_of_edge: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
    host_row_of_edge: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of edges and entropies of rows; both differentiable in hidden, weight and bias.

    hidden: [R, d] hidden states of the rows. targets: int64 [E] token ids. row_of_edge: int64 [E] indices into rows.
    temperature: logits are divided by it, after scale and soft-cap; a number, or one per row, [R].
    host_row_of_edge: row_of_edge in the CPU's memory. Without it a device is waited for, once.

    Returns (logprobs [E], entropies [R] in nats or None), float32 (float64 for float64 hidden states).
    """
    edges = Edges.from_targets(targets, row_of_edge, len(hidden), host_row_of_edge)
    if not head.is_plain:
        return _through_module(hidden, head, edges, temperature, return_entropy)
    weight, bias = head.module.weight, head.module.bias
    dtype = head.dtype or compute_dtype(hidden.device.type, hidden.dtype)
    weight, bias = (None if x is None else x.to(dtype) for x in (weight, bias))
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(accumulation_dtype(dtype))
    transform = LogitTransform(head.scale, head.softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtype was chosen above
        logprobs, entropies = TiledLogProbs.apply(hidden.to(dtype), weight, bias, edges, transform, return_entropy)
    return logprobs, entropies if return_entropy else None


def _through_module(
    hidden: torch.Tensor,
    head: LMHead,
    edges: Edges,
    temperature: float | torch.Tensor,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For heads that are more than a weight (an adapter, quantisation): call the module, recompute rows in backward."""

    scales = temperature[:, None] if isinstance(temperature, torch.Tensor) else None

    def tile(
        r: slice, rows: torch.Tensor, tokens: torch.Tensor, in_row: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head.logits(rows)
        scale = temperature if scales is None else scales[r].to(logits.dtype)
        logp = (logits / scale).log_softmax(dim=-1)
        return logp[in_row, tokens], -(logp.exp() * logp).sum(dim=-1)

    logprobs, entropies = [], []
    for r in row_tiles(max(len(hidden), 1)):
        mine = edges.of_rows(r)
        chosen, entropy = checkpoint(
            tile, r, hidden[r], edges.target[mine], edges.row[mine] - r.start, use_reentrant=False
        )
        logprobs.append(chosen)
        entropies.append(entropy)
    back = edges.order.argsort()
    return torch.cat(logprobs)[back], torch.cat(entropies) if return_entropy else None
