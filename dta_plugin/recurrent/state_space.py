"""The scan of Mamba 2 over a tree: transformers' `mamba2_chunk_scan`, each token from its parent's state.

The row is cut into blocks. What happens inside a block is matrix products over all blocks at once; what blocks hand
on takes one step per level of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.upload import upload


def tree_mamba2_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of T tokens, H heads of P channels, and G groups of heads that share B and C.

    hidden_states, z: [1, T, H, P]; dt: [1, T, H]; A, D, dt_bias: [H]; B, C: [1, T, G, N]; initial: [1, H, P, N].
    dt becomes the length of a step in its own dtype, as in the models; all else is computed in float32, or float64.

    Returns:
        (out [1, T, H, P], states [K, H, P, N] behind `plan.leaves`)
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    step = step_lengths(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    with torch.autocast(hidden_states.device.type, enabled=False):
        x, step, A, B, C = (tensor.to(dtype) for tensor in (hidden_states[0], step[0], A, B[0], C[0]))
        cut = _cut(plan, x.shape[-1], B.shape[-1], x.device)
        out, states = _scan(x * step[..., None], step * A, B, C, cut, None if initial is None else initial[0].to(dtype))
        if D is not None:
            out = out + D.to(dtype)[:, None] * x
        if z is not None:
            out = out * F.silu(z[0].to(dtype))
    return out[None], states


def step_lengths(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """What the models' functions make of `dt`, in its dtype."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _scan(
    x: torch.Tensor, a: torch.Tensor, B: torch.Tensor, C: torch.Tensor, cut: _Cut, initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, H, P] what comes into the states; a: [T, H] the logarithms of what stays of them; B, C: [T, G, N]."""
    heads, width = x.shape[1:]
    groups = B.shape[1]
    a, x, B, C = (cut.spread(tensor) for tensor in (a, x, B, C))  # [b, l, ...]: blocks, and places in them
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # [b, g, l, n]
    by_group = (groups, heads // groups)

    kept = _sums_between(a.transpose(1, 2)).exp()  # [b, h, l, l] of what came in at one place, at a later one
    weights = (C @ B.mT)[:, :, None] * kept.unflatten(1, by_group)  # [b, g, h / g, l, l]
    out = (weights.flatten(1, 2) @ x.transpose(1, 2)).transpose(1, 2)  # [b, l, h, p]

    since_start = a.cumsum(1)
    to_end = (a.flip(1).cumsum(1).flip(1) - a).exp()  # [b, l, h]
    added = (x * to_end[..., None]).unflatten(2, by_group).flatten(3)  # [b, l, g, h / g * p]
    added = (added.permute(0, 2, 3, 1) @ B).unflatten(2, (-1, width)).flatten(1, 2)  # [b, h, p, n]
    before, states = _Levels.apply(added, since_start[:, -1].exp(), initial, cut)

    across = C @ before.unflatten(1, by_group).flatten(2, 3).mT  # [b, g, l, h / g * p]
    across = across.transpose(1, 2).flatten(2).unflatten(2, (heads, width))
    return cut.collect(torch.addcmul(out, across, since_start.exp()[..., None])), states


def _sums_between(a: torch.Tensor) -> torch.Tensor:
    """[..., L] -> [..., L, L]: at (i, j) the sum of a behind j, up to i; -inf where i is before j.

    Differences of float64 sums: those of float32 sums are wrong by the rounding of the whole sum.
    """
    sums = a.cumsum(-1, dtype=torch.float64)
    between = (sums[..., :, None] - sums[..., None, :]).to(a.dtype)
    size = a.shape[-1]
    return between.masked_fill(~torch.ones(size, size, dtype=torch.bool, device=a.device).tril(), float("-inf"))


class _Levels(torch.autograd.Function):
    """(added [B, H, P, N], kept [B, H], initial) -> (states before each block, those behind the leaves)."""

    @staticmethod
    def forward(ctx: Any, added: torch.Tensor, kept: torch.Tensor, initial: torch.Tensor | None, cut: _Cut) -> Any:
        kept = kept[..., None, None]
        # Behind each block, and in the last row what comes in.
        behind = torch.cat([added, torch.zeros_like(added[:1]) if initial is None else initial[None]])
        for level in cut.levels:
            behind[level].addcmul_(kept[level], behind[cut.above[level]])
        before = behind[cut.above]
        ctx.save_for_backward(before, kept)
        ctx.cut = cut
        return before, behind[cut.leaves]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_before: torch.Tensor, grad_states: torch.Tensor) -> Any:
        before, kept = ctx.saved_tensors
        cut: _Cut = ctx.cut
        grad = before.new_zeros(len(before) + 1, *before.shape[1:]).index_add_(0, cut.leaves, grad_states)
        for level in reversed(cut.levels):
            grad.index_add_(0, cut.above[level], torch.addcmul(grad_before[level], kept[level], grad[level]))
        added = grad[:-1]
        return added, (added * before).sum((-2, -1)), grad[-1] if ctx.needs_input_grad[2] else None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """Blocks on a device.

    Attributes:
        count, size: blocks, and places in each.
        levels: slices of the blocks.
        slots: [T] the place of each token among all.
        above: [B] the block above, B for the state that comes in.
        leaves: [K] the block behind which each state leaves.
    """

    count: int
    size: int
    levels: list[slice]
    slots: torch.Tensor
    above: torch.Tensor
    leaves: torch.Tensor

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [B, size, ...], zero where there is no token."""
        places = x.new_zeros(self.count * self.size, *x.shape[1:])
        return places.index_copy(0, self.slots, x).unflatten(0, (self.count, self.size))

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1).index_select(0, self.slots)


def _cut(plan: StatePlan, width: int, states: int, device: torch.device) -> _Cut:
    return plan.cached(("state space", width, states, device), lambda: _build(plan, width, states, device))


def _build(plan: StatePlan, width: int, states: int, device: torch.device) -> _Cut:
    blocks = plan.blocks(_block_size(plan.nodes().length, width, states))
    size = int(blocks.length.max())
    offset = np.arange(len(plan)) - np.repeat(np.cumsum(blocks.length) - blocks.length, blocks.length)
    token = np.repeat(blocks.start, blocks.length) + offset
    slots = np.empty(len(plan), dtype=np.int64)
    slots[token] = np.repeat(np.arange(len(blocks)) * size, blocks.length) + offset
    above = np.where(blocks.parent < 0, len(blocks), blocks.parent)
    on_device = upload([slots, above, blocks.leaves], device)
    return _Cut(len(blocks), size, blocks.levels, *on_device)


def _block_size(nodes: np.ndarray, width: int, states: int) -> int:
    """The size with least work for nodes of these lengths, a head's: [size, size] weights, and a state per block."""

    def work(size: int) -> int:
        inside = size * size * (width + 32) + 2 * size * width * states
        return int((-(-nodes // size)).sum()) * (inside + 48 * width * states)

    return min(range(16, 129, 8), key=work)
