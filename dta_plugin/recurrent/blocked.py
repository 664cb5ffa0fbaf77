"""Tokens to blocks and back: whole rows are copied, backward too, since every token has a place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.upload import upload


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the T tokens of a row stand, per head, in B blocks padded to `size`.

    Attributes:
        shape: (B, heads, size).
        rows: int64 [B * heads * size] which of the T * heads rows stands in every place, any in padding.
        padding: int64 [P] places in which none does.
        of: int64 [T * heads] the place of every row.
    """

    shape: tuple[int, int, int]
    rows: torch.Tensor
    padding: torch.Tensor
    of: torch.Tensor


def places(plan: StatePlan, size: int, heads: int, device: torch.device) -> Places:
    """The places of a row cut into blocks of at most `size` tokens."""
    return plan.cached(("places", size, heads, device), lambda: _places(plan, size, heads, device))


def to_blocks(x: torch.Tensor, where: Places) -> torch.Tensor:
    """[T, heads, D] -> [B, heads, size, D], zero in padding."""
    rows = _Move.apply(x.reshape(-1, x.shape[-1]), where, True)
    return rows.view(*where.shape, -1)


def to_tokens(x: torch.Tensor, where: Places) -> torch.Tensor:
    """[B, heads, size, D] -> [T, heads, D]."""
    rows = _Move.apply(x.reshape(-1, x.shape[-1]), where, False)
    return rows.view(-1, where.shape[1], x.shape[-1])


def _places(plan: StatePlan, size: int, heads: int, device: torch.device) -> Places:
    blocks = plan.blocks(size)
    inside = np.arange(size)
    is_token = np.broadcast_to((inside < blocks.length[:, None])[:, None], (len(blocks), heads, size)).reshape(-1)
    token = (blocks.start[:, None] + inside)[:, None] * heads + np.arange(heads)[:, None]
    rows = np.where(is_token, token.reshape(-1), 0)
    of = np.empty(len(plan) * heads, dtype=np.int64)
    of[rows[is_token]] = np.flatnonzero(is_token)
    return Places((len(blocks), heads, size), *upload([rows, np.flatnonzero(~is_token), of], device))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: Places, is_into_blocks: bool) -> torch.Tensor:
        ctx.where, ctx.is_into_blocks = where, is_into_blocks
        return _moved(x, where, is_into_blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _moved(grad, ctx.where, not ctx.is_into_blocks), None, None


def _moved(x: torch.Tensor, where: Places, is_into_blocks: bool) -> torch.Tensor:
    if not is_into_blocks:
        return x.index_select(0, where.of)
    return x.index_select(0, where.rows).index_fill_(0, where.padding, 0)
