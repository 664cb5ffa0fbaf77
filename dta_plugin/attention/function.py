"""The autograd function that the backends with kernels of their own share."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class Kernels(Protocol):
    """Forward and backward of tree attention over one tree.

    q: [1, Hq, Tq, D]. k: [1, Hkv, T, D]. v: [1, Hkv, T, Dv]; the queries are the last Tq of the T tokens.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> out [1, Hq, Tq, Dv] in q's dtype, and log-sum-exp of the scores, sinks included, [1, Hq, Tq]."""

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_k: torch.Tensor,
        grad_v: torch.Tensor,
    ) -> torch.Tensor:
        """-> gradient of q. Adds the gradients of k and v to `grad_k` and `grad_v`, float32 or wider, in place."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, kernels: Kernels
) -> torch.Tensor:
    """[1, Hq, Tq, Dv], differentiable once in q, k, v and sinks."""
    return _Attend.apply(q, k, v, sinks, kernels)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, kernels: Kernels):
        out, lse = kernels.forward(q, k, v, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad_k, grad_v = (zeros_token_major(x) for x in (k, v))
        grad_q = ctx.kernels.backward(grad, q, k, v, out, lse, grad_k, grad_v)
        grad_sinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """[Hq] A sink takes the weight exp(sink - lse) and gives no value."""
    delta = torch.linalg.vecdot(grad.to(lse.dtype), out.to(lse.dtype))
    return -(torch.exp(sinks[None, :, None] - lse) * delta).sum(dim=(0, 2)).to(sinks.dtype)


def zeros_token_major(x: torch.Tensor) -> torch.Tensor:
    """Zeros [1, H, T, D] in memory [1, T, H, D], in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=dtype).transpose(1, 2)
