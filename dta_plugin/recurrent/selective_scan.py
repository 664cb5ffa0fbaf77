"""The scan of Mamba 1 over a tree: transformers' `mamba_selective_scan`, each token from its parent's state.

Every channel forgets at its own rate for every entry of its state, so nothing inside a block is a matrix product. All
blocks of a level go token by token together, and the backward pass goes through them again from the states between.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.recurrent.plan import Blocks, StatePlan
from dta_plugin.recurrent.state_space import step_lengths
from dta_plugin.upload import upload

_BLOCK = 32
"""Tokens between states that are kept for the backward pass."""

_CACHE_ENTRIES, _GPU_ENTRIES = 2**20, 2**24
"""Entries of states that are held at once, where a block has fewer: a CPU's caches are small, a GPU wants work."""


def tree_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of T tokens and W channels with a state of N entries each.

    hidden_states, dt, z: [1, W, T]; A: [W, N]; B, C: [1, N, T]; D, delta_bias: [W]; initial: [1, W, N].
    dt becomes the length of a step in its own dtype, as in the models; all else is computed in float32, or float64.

    Returns:
        (out [1, W, T], states [K, W, N] behind `plan.leaves`)
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    step = step_lengths(dt, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    with torch.autocast(hidden_states.device.type, enabled=False):
        x, step, B, C = (tensor[0].T.to(dtype) for tensor in (hidden_states, step, B, C))
        start = torch.zeros_like(A, dtype=dtype) if initial is None else initial[0].to(dtype)
        cut = _cut(plan, A.numel(), x.device)
        out, states = _Scan.apply(step, step * x, A.T.to(dtype), B, C, start.T, cut)
        if D is not None:
            out = out + D.to(dtype) * x
        if z is not None:
            out = out * F.silu(z[0].T.to(dtype))
    others = (tensor.dtype for tensor in (D, z) if tensor is not None)
    return out.T[None].to(reduce(torch.promote_types, others, hidden_states.dtype)), states.mT


class _Scan(torch.autograd.Function):
    """(step, fed [T, W], A [N, W], B, C [T, N], initial [N, W]) -> (out [T, W], states [K, N, W]).

    Channels are next to each other in memory, states [N, W] too. All per-token tensors get one more row of zeros,
    which is where places without a token read and write: a step of no length leaves the state as it is.
    """

    @staticmethod
    def forward(ctx: Any, step, fed, A, B, C, initial, cut: _Cut) -> Any:
        given = step, fed, A, B, C
        step, fed, B, C = map(_with_nobody, (step, fed, B, C))
        out = torch.empty_like(step)
        behind = step.new_empty(cut.count + 1, *A.shape)  # each block, and in the last row what comes in
        behind[-1] = initial
        for part in cut.parts:
            at = part.tokens
            _, states = _run(step[at], fed[at], A, B[at], behind[part.above])
            behind[part.blocks] = states[-1]
            out[at] = (C[at][:, :, None] @ states)[:, :, 0]
        ctx.save_for_backward(*given, behind)
        ctx.cut = cut
        return out[:-1], behind[cut.leaves]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out, grad_states) -> Any:
        step, fed, A, B, C, behind = ctx.saved_tensors
        cut: _Cut = ctx.cut
        step, fed, B, C, grad_out = map(_with_nobody, (step, fed, B, C, grad_out))
        of_tokens = [torch.empty_like(tensor) for tensor in (step, fed, B, C)]
        of_A = torch.zeros_like(A)
        of_behind = torch.zeros_like(behind).index_add_(0, cut.leaves, grad_states)
        with torch.autocast(step.device.type, enabled=False):
            for part in reversed(cut.parts):
                at = part.tokens
                inputs = step[at], fed[at], A, B[at], behind[part.above], C[at], grad_out[at], of_behind[part.blocks]
                *own, own_A, of_above = _run_back(*inputs)
                for grad, values in zip(of_tokens, own, strict=True):
                    grad[at] = values
                of_A += own_A
                of_behind.index_add_(0, part.above, of_above)
        of_step, of_fed, of_B, of_C = (grad[:-1] for grad in of_tokens)
        return of_step, of_fed, of_A, of_B, of_C, of_behind[-1], None


def _run(
    step: torch.Tensor, fed: torch.Tensor, A: torch.Tensor, B: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """l tokens of b blocks from the states before them: ([l, b, N, W] what stays of the last state, the states)."""
    kept = (step[:, :, None] * A).exp_()
    states = fed[:, :, None] * B[..., None]
    for place in range(len(kept)):
        before = states[place].addcmul_(kept[place], before)
    return kept, states


def _run_back(
    step: torch.Tensor,
    fed: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    before: torch.Tensor,
    C: torch.Tensor,
    grad_out: torch.Tensor,
    grad_behind: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of step, fed, B, C, A and the states before the blocks, whose states are computed once more."""
    kept, states = _run(step, fed, A, B, before)
    grad = grad_out[:, :, None] * C[..., None]  # of the states
    grad[-1] += grad_behind
    for place in range(len(kept) - 1, 0, -1):
        grad[place - 1].addcmul_(kept[place], grad[place])
    of_fed, of_B = (B[:, :, None] @ grad)[:, :, 0], (grad @ fed[..., None])[..., 0]
    of_C = (states @ grad_out[..., None])[..., 0]
    of_before = kept[0] * grad[0]
    exponent = kept.mul_(grad)
    exponent[0] *= before
    exponent[1:] *= states[:-1]
    of_step = (exponent * A).sum(2)
    return [of_step, of_fed, of_B, of_C, exponent.mul_(step[:, :, None]).sum((0, 1)), of_before]


def _with_nobody(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Blocks of one level that are computed together.

    Attributes:
        tokens: [l, b] their tokens, T where a block is shorter.
        above: [b] the block above, the number of all for what comes in.
        blocks: which they are.
    """

    tokens: torch.Tensor
    above: torch.Tensor
    blocks: slice


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    count: int
    leaves: torch.Tensor
    parts: list[_Part]


def _cut(plan: StatePlan, entries: int, device: torch.device) -> _Cut:
    held = _CACHE_ENTRIES if device.type == "cpu" else _GPU_ENTRIES
    together = max(1, held // (_BLOCK * entries))
    return plan.cached(("selective scan", together, device), lambda: _build(plan, together, device))


def _build(plan: StatePlan, together: int, device: torch.device) -> _Cut:
    blocks = plan.blocks(_BLOCK)
    slices = [
        slice(first, min(first + together, level.stop))
        for level in blocks.levels
        for first in range(level.start, level.stop, together)
    ]
    tokens = [_tokens(blocks, part, len(plan)) for part in slices]
    above = np.where(blocks.parent < 0, len(blocks), blocks.parent)
    leaves, above_all, *flat = upload([blocks.leaves, above, *(part.ravel() for part in tokens)], device)
    parts = [
        _Part(own.view(shaped.shape), above_all[part], part)
        for part, shaped, own in zip(slices, tokens, flat, strict=True)
    ]
    return _Cut(len(blocks), leaves, parts)


def _tokens(blocks: Blocks, part: slice, nobody: int) -> np.ndarray:
    start, length = blocks.start[part], blocks.length[part]
    place = np.arange(length.max())[:, None]
    return np.where(place < length, start + place, nobody)
