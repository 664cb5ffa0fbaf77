"""What the Triton kernels of the forward and the backward pass share: rows of matrices, visits of tiles, the mask.

Scores are kept in base 2; everything accumulates in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Columns of its output that one program accumulates; a wider head has several programs per tile.
WIDEST = 256

# Sizes that change with every batch: compiled once for all values.
DYNAMIC = ["queries", "keys", "first_query", "window"]


class Matrix(NamedTuple):
    """[H, rows, width] with unit column stride, as the kernels take it.

    block: columns of its tiles: matrix units want a power of 2, at least 16. share: those that one program accumulates.
    """

    base: torch.Tensor
    head_stride: int
    row_stride: int
    width: Any
    block: Any
    share: Any

    @classmethod
    def from_tensor(cls, x: torch.Tensor) -> Matrix:
        """x: [1, H, rows, width]"""
        return cls(x, x.stride(1), x.stride(2), *_columns(x.shape[3]))

    @classmethod
    def from_tiles(cls, x: torch.Tensor) -> Matrix:
        """x: [1, N, tile, width], contiguous: the strides depend on no length and are compiled in."""
        return cls.from_tensor(x)._replace(head_stride=tl.constexpr(x.stride(1)), row_stride=tl.constexpr(x.stride(2)))


def block_of(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


@cache
def _columns(width: int) -> tuple[Any, ...]:
    """width, block and share."""
    block = block_of(width)
    return tuple(map(tl.constexpr, (width, block, min(block, WIDEST))))


@triton.jit
def load_rows(M, head, row, rows, CHECKED: tl.constexpr, first=None):
    """[len(row), block] of a head's matrix, or [len(row), share] from column `first` on.

    Zeros beyond its width and, if CHECKED, beyond `rows`.
    """
    return load_at(M.base + head * M.head_stride, M, row, rows, CHECKED, first)


@triton.jit
def load_at(base, M, row, rows, CHECKED: tl.constexpr, first=None):
    """The same of the head whose matrix begins at `base`."""
    column = tl.arange(0, M.block) if first is None else first + tl.arange(0, M.share)
    place = base + row[:, None].to(tl.int64) * M.row_stride + column[None, :]
    if CHECKED:
        return tl.load(place, mask=(row < rows)[:, None] & (column < M.width)[None, :], other=0.0)
    elif M.width != M.block:
        return tl.load(place, mask=(column < M.width)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_rows(M, head, row, rows, value, first):
    """The program's share of a head's rows, from column `first` on."""
    column = first + tl.arange(0, M.share)
    place = M.base + head * M.head_stride + row[:, None].to(tl.int64) * M.row_stride + column[None, :]
    tl.store(place, value.to(M.base.dtype.element_ty), mask=(row < rows)[:, None] & (column < M.width)[None, :])


@triton.jit
def first_column(M):
    """Where this program's share of an output begins."""
    if M.block > M.share:
        return tl.program_id(2) * M.share
    else:
        return 0


@triton.jit
def load_values(base, row, rows, CHECKED: tl.constexpr):
    return tl.load(base + row, mask=row < rows, other=0) if CHECKED else tl.load(base + row)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, number):
    """[ROWS, COLUMNS] zeros that the compiler does not know to be alike. number: any finite float32.

    Where a loop may run zero times, ptxas would set known zeros on the way around it, take that for a use of the
    accumulator while products are in flight, and wait for each product by itself (its note C7515).
    """
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return index.to(tl.float32) * (number * 0.0)


@triton.jit
def visits_of(tile, Start, Masked):
    """Where the tile's visits begin in the list of tiles, where those that need the mask begin, and where they end."""
    return tl.load(Start + tile), tl.load(Masked + tile), tl.load(Start + tile + 1)


@triton.jit
def sees(query, last, near, query_depth, key, key_exit, key_depth, window, AXIS: tl.constexpr):
    """The mask, with keys along AXIS. Bool [len(query), len(key)] or transposed.

    last: the last key that each query may see. near: the first that it sees whatever the window, or None.
    """
    key, key_exit = tl.expand_dims(key, 1 - AXIS), tl.expand_dims(key_exit, 1 - AXIS)
    query = tl.expand_dims(query, AXIS)
    visible = (key <= tl.expand_dims(last, AXIS)) & (query < key_exit)
    if window is not None:
        is_near = tl.expand_dims(query_depth, AXIS) - tl.expand_dims(key_depth, 1 - AXIS) < window
        if near is not None:
            is_near = is_near | (key >= tl.expand_dims(near, AXIS))
        visible = visible & is_near
    return visible


@triton.jit
def is_visible(query, last, near, query_depth, key, Exit, Depth, keys, window):
    """Bool [len(query), len(key)] of the mask."""
    key_exit, key_depth = load_values(Exit, key, keys, True), load_values(Depth, key, keys, True)
    return sees(query, last, near, query_depth, key, key_exit, key_depth, window, 1)


@triton.jit
def capped(product, scale, softcap):
    """q.k -> tanh(scaled score / soft-cap), by its Taylor series where ``1 - exp(-2x)`` would cancel."""
    x = (scale / softcap) * product
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, series, tl.where(x < 0.0, -size, size))
