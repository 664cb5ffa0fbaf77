"""Short causal convolutions over a prefix tree: a token sees its nearest ancestors, wherever in the row they stand.

Most tokens stand right behind their parent: the ordinary convolution along the row is true for them. The few within a
convolution's width behind a fork, or behind the state that comes in, are computed from their ancestors and put in their
places; no gradient passes through what stood there.

FLA's kernel computes one long row: before each run of tokens that does not stand behind its parent, the nearest
ancestors come again, and what is computed for those is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dta_plugin.dtypes import accumulation_dtype, compute_dtype
from dta_plugin.errors import UnsupportedError
from dta_plugin.recurrent.fla import Kernel
from dta_plugin.recurrent.gather import take
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.upload import upload

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "swish": F.silu}


def tree_causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | Callable[[torch.Tensor], torch.Tensor] | None,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' depthwise `causal_conv1d_fn` on one row.

    Args:
        x: [1, D, T]; weight: [D, W], of the token itself last; bias: [D].
        activation: a function, or the name of one.
        initial: [1, D, W - 1] what came before tokens without a parent, latest last; None for zeros.
        kernel: FLA's `causal_conv1d`, None for torch's operations.

    Returns:
        [1, D, T] and the last W - 1 inputs up to each of `plan.leaves`, [K, D, W - 1], both in the dtype of x.

    Raises:
        UnsupportedError: no activation of that name.
    """
    act, (width, device) = _activation(activation), (weight.shape[1], x.device)
    near = plan.cached(("convolution", width, device), lambda: _near(plan, width, device))
    before = x.new_zeros(width - 1, len(weight)) if initial is None else initial.squeeze(0).to(x.dtype).T
    row = torch.cat([before, x.squeeze(0).T])
    states = row.index_select(0, near.states).view(len(plan.leaves), width - 1, len(weight)).transpose(1, 2)
    dtype = compute_dtype(device.type, weight.dtype)
    if kernel is None:
        y = _Convolution.apply(*(None if t is None else _rounded(t, dtype) for t in (row, weight.T, bias)), near)
    else:
        y = _by_kernel(kernel, row.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), plan)
    return act(y.to(dtype).T.unsqueeze(0)).to(x.dtype), states


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a convolution in `dtype` reads, in what it sums in."""
    return x.to(dtype).to(accumulation_dtype(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class _Near:
    """What a convolution along the row gets wrong. Rows count from the first of the W - 1 that came before.

    Attributes:
        tokens: int64 [m] those with an ancestor that does not stand right before them.
        taps: int64 [W, m] the rows of their windows, their own last.
        states: int64 [K * (W - 1)] the rows of the states that leave.
    """

    tokens: torch.Tensor
    taps: torch.Tensor
    states: torch.Tensor


def _near(plan: StatePlan, width: int, device: torch.device) -> _Near:
    own = np.arange(len(plan))[:, None] + width - 1
    ancestors = plan.ancestors(width - 1, torch.device("cpu")).numpy()
    tokens = np.flatnonzero((ancestors != own - 1 - np.arange(width - 1)).any(1))
    windows = np.concatenate([ancestors[:, ::-1], own], 1)
    taps, states = windows[tokens].T.reshape(-1), windows[plan.leaves][:, 1:].reshape(-1)
    sent = upload([tokens, taps, states], device)
    return _Near(sent[0], sent[1].view(width, len(tokens)), sent[2])


def _by_kernel(
    kernel: Kernel, row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: StatePlan
) -> torch.Tensor:
    """As `_Convolution`, with weight [D, W]."""
    width, device = weight.shape[1], row.device
    rows, own = plan.cached(("long row", width, device), lambda: _long_row(plan, width, device))
    long, _ = kernel(take(row, rows).unsqueeze(0), weight, bias)
    return long.squeeze(0).index_select(0, own)


def _long_row(plan: StatePlan, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stand in the long row, counted as in `_Near`, and where in it each token's output is taken."""
    start = np.flatnonzero(plan.parent != np.arange(-1, len(plan) - 1))
    start = np.union1d(start, [0]).astype(np.int64)
    length = np.diff(np.append(start, len(plan)))
    ancestors = plan.ancestors(width - 1, torch.device("cpu")).numpy()[start, ::-1]
    rows = np.empty(len(plan) + ancestors.size, dtype=np.int64)
    own = np.arange(len(plan)) + np.repeat(np.arange(1, len(start) + 1) * (width - 1), length)
    is_own = np.zeros(len(rows), dtype=bool)
    is_own[own] = True
    rows[own], rows[~is_own] = np.arange(len(plan)) + width - 1, ancestors.reshape(-1)
    on_device = upload([rows, own], device)
    return on_device[0], on_device[1]


class _Convolution(torch.autograd.Function):
    """Shifted products summed in place: no [T, D, W], and several times as fast on a CPU as a depthwise conv1d."""

    @staticmethod
    def forward(
        ctx: Any, row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, near: _Near
    ) -> torch.Tensor:
        """row: [W - 1 + T, D]; weight: [W, D]; bias: [D] -> [T, D]."""
        ctx.save_for_backward(row, weight)
        ctx.near = near
        total = len(row) + 1 - len(weight)
        bias = row.new_zeros(row.shape[1]) if bias is None else bias
        y = torch.addcmul(bias, row[:total], weight[0])
        for step in range(1, len(weight)):
            y.addcmul_(row[step : step + total], weight[step])
        return y.index_copy_(0, near.tokens, (_windows(row, near) * weight.unsqueeze(1)).sum(0).add_(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row, weight), near = ctx.saved_tensors, ctx.near
        total = len(grad)
        own, along = grad.index_select(0, near.tokens), grad.index_fill(0, near.tokens, 0)
        d_row = d_weight = None
        if ctx.needs_input_grad[0]:
            d_row = torch.zeros_like(row)
            for step in range(len(weight)):
                d_row[step : step + total].addcmul_(along, weight[step])
            d_row.index_add_(0, near.taps.view(-1), (own * weight.unsqueeze(1)).flatten(0, 1))
        if ctx.needs_input_grad[1]:
            d_weight, product = (_windows(row, near) * own).sum(1), torch.empty_like(along)
            for step in range(len(weight)):
                d_weight[step] += torch.mul(along, row[step : step + total], out=product).sum(0)
        return d_row, d_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def _windows(row: torch.Tensor, near: _Near) -> torch.Tensor:
    """[W, m, D]"""
    return row.index_select(0, near.taps.view(-1)).view(*near.taps.shape, row.shape[1])


def _activation(given: str | Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if given is None:
        return torch.nn.Identity()
    if callable(given):
        return given
    found = _ACTIVATIONS.get(given) or getattr(F, given, None)
    if found is None:
        raise UnsupportedError(
            f"Got a convolution whose activation is {given!r}. Expected {sorted(_ACTIVATIONS)} or the name of a "
            "function of torch.nn.functional; pass the function itself."
        )
    return found
