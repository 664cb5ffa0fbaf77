"""Dense-mask tree attention in plain torch: the specification of the op, in any dtype. O(T^2) memory."""

from __future__ import annotations

import torch

from dta_plugin.attention.mask import TreeMask


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in `tree_attention`; scores and softmax in float32 (float64 for float64 input)."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1).to(accumulate) for x in (k, v))
    scores = q.to(accumulate) @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.visible(window)[-q.shape[2] :], float("-inf"))
    if sinks is not None:
        sink_column = sinks.to(accumulate).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink_column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ values).to(q.dtype)
