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


class Place(Protocol):
    """Where the keys of a call lie: its own tensors, or an arena in which those of its ancestors come first.

    k: [1, Hkv, C, D], v: [1, Hkv, C, Dv] of the call; keys and their gradients: [1, Hkv, T, D], the last C the call's.
    first: T - C.
    """

    first: int

    def write(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> all keys and values that the queries may see."""

    def keep(self) -> None:
        """The forward pass is over."""

    def gradients(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> buffers, float32 or wider, to which the backward pass adds."""

    def collect(self, grad_keys: torch.Tensor, grad_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the gradients of the call's own k and v."""


class OwnKeys:
    """The keys are the call's own."""

    first = 0

    def write(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k, v

    def keep(self) -> None:
        pass

    def gradients(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return accumulator(keys), accumulator(values)

    def collect(self, grad_keys: torch.Tensor, grad_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_keys, grad_values


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, kernels: Kernels, place: Place
) -> torch.Tensor:
    """[1, Hq, Tq, Dv], differentiable once in q, k, v and sinks."""
    return _Attend.apply(q, k, v, sinks, kernels, place)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, kernels: Kernels, place: Place):
        out, lse = kernels.forward(q, *place.write(k, v), sinks)
        place.keep()
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.kernels, ctx.place = kernels, place
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            keys, values = ctx.place.write(k, v)
            buffers = ctx.place.gradients(keys, values)
            grad_q = ctx.kernels.backward(grad, q, keys, values, out, lse, *buffers)
            grad_k, grad_v = ctx.place.collect(*buffers)
            grad_sinks = sink_gradient(grad, out, lse, sinks) if ctx.needs_input_grad[3] else None
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None, None


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """[Hq] A sink takes the weight exp(sink - lse) and gives no value."""
    delta = torch.linalg.vecdot(grad.to(lse.dtype), out.to(lse.dtype))
    return -(torch.exp(sinks[None, :, None] - lse) * delta).sum(dim=(0, 2)).to(sinks.dtype)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with its columns next to each other in memory, which all kernels expect; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulator(x: torch.Tensor) -> torch.Tensor:
    """Zeros [1, H, T, D] in memory [1, T, H, D], in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=dtype).transpose(1, 2)
