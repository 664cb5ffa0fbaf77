"""Tokens in another order, some more than once: what kernels for sequences in a row are given of a tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype


def take(x: torch.Tensor, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """x.index_select(dim, rows), for which gradients of what is taken more than once are summed in float32 or wider."""
    return _Take.apply(x, rows, dim)


def spans(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... up to its length, then those of the next."""
    before = np.cumsum(length) - length
    return np.arange(length.sum()) + np.repeat(start - before, length)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.dim = x.shape, dim
        return x.index_select(dim, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        wide = grad.to(accumulation_dtype(grad.dtype))
        return wide.new_zeros(ctx.shape).index_add_(ctx.dim, rows, wide).to(grad.dtype), None, None
