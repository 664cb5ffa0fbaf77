"""Forward kernel of tree attention in Triton, and what the backward kernels share with it.

One program per query tile and head runs an online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1) over the
key tiles that `attention/tiles.py` lists for it. Full tiles have neither mask nor bounds checks; masked tiles test
``key <= query < exit[key]`` and the window. Scores are kept in base 2; everything accumulates in float32.

K and V may hold more rows than Q: queries are then the last rows of the layout, `first_query` the index of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Columns of its output that one program accumulates; a wider head has several programs per tile.
WIDEST = tl.constexpr(256)

# Sizes that change with every batch: compiled once for all values.
DYNAMIC = ["queries", "keys", "first_query", "window"]


@triton.jit
def load_rows(base, row, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr, first=0):
    """[len(row), BLOCK] of a matrix with unit column stride, from column `first` on.

    Zeros beyond WIDTH and, if CHECKED, beyond `rows`.
    """
    column = first + tl.arange(0, BLOCK)
    place = base + row[:, None].to(tl.int64) * stride + column[None, :]
    if CHECKED:
        return tl.load(place, mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH != BLOCK and WIDTH != 2 * BLOCK:  # a wide head has two shares
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, number):
    """[ROWS, COLUMNS] zeros that the compiler does not know to be alike. number: any finite float32.

    Where a loop may run zero times, ptxas would set known zeros on the way around it, take that for a use of the
    accumulator while products are in flight, and wait for each product by itself (its note C7515).
    """
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return index.to(tl.float32) * (number * 0.0)


@triton.jit
def first_column(BLOCK: tl.constexpr):
    """Where this program's share of an output with BLOCK columns begins."""
    if BLOCK > WIDEST:
        return tl.program_id(2) * WIDEST
    else:
        return 0


@triton.jit
def store_rows(base, row, stride, rows, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr, first=0):
    column = first + tl.arange(0, BLOCK)
    place = base + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=(row < rows)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def capped(product, scale, softcap):
    """q.k -> tanh(scaled score / soft-cap), by its Taylor series where ``1 - exp(-2x)`` would cancel."""
    x = (scale / softcap) * product
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, series, tl.where(x < 0.0, -size, size))


@triton.jit
def is_visible(query, query_depth, key, Exit, Depth, keys, window, HAS_WINDOW: tl.constexpr):
    """Bool [len(query), len(key)] of the tree-causal mask."""
    inside = key < keys
    key_exit = tl.load(Exit + key, mask=inside, other=0)
    visible = (key[None, :] <= query[:, None]) & (query[:, None] < key_exit[None, :])
    if HAS_WINDOW:
        key_depth = tl.load(Depth + key, mask=inside, other=0)
        visible = visible & (query_depth[:, None] - key_depth[None, :] < window)
    return visible


@triton.jit
def _attend(
    acc, top, total, q, K, V, Exit, Depth, query, query_depth, tile,
    k_row, v_row, keys, first, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, KEY_TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: (acc, top, total) after the keys of `tile`."""
    SHARE_DV: tl.constexpr = BLOCK_DV if BLOCK_DV < WIDEST else WIDEST
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    k = load_rows(K, key, k_row, keys, D, BLOCK_D, MASKED)
    v = load_rows(V, key, v_row, keys, DV, SHARE_DV, MASKED, first)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        score = capped(score, scale, softcap)
        to_base_2 = softcap * LOG2_E
    else:
        to_base_2 = scale * LOG2_E
    if MASKED:
        visible = is_visible(query, query_depth, key, Exit, Depth, keys, window, HAS_WINDOW)
        score = tl.where(visible, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1) * to_base_2)
    origin = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weight = tl.exp2(score * to_base_2 - origin[:, None])
    shrink = tl.exp2(top - origin)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=DYNAMIC)
def forward_kernel(
    Q, K, V, Out, Lse, Sinks, Exit, Depth, Order, Start, Masked, Column,
    q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out [Hq, queries, DV] and Lse float32 [Hq, queries], natural logarithm. Grid (Hq, query tiles, shares of DV)."""
    SHARE_DV: tl.constexpr = BLOCK_DV if BLOCK_DV < WIDEST else WIDEST
    head = tl.program_id(0).to(tl.int64)
    tile = tl.load(Order + tl.program_id(1))
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query = first_query + row
    q = load_rows(Q + head * q_head, row, q_row, queries, D, BLOCK_D, True)
    query_depth = tl.load(Depth + query, mask=row < queries, other=0)
    K += (head // GROUPS) * k_head
    V += (head // GROUPS) * v_head
    first = first_column(BLOCK_DV)

    acc = zeros(QUERY_TILE, SHARE_DV, scale)
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    begin = tl.load(Start + tile)
    masked = tl.load(Masked + tile)
    end = tl.load(Start + tile + 1)
    key_tile = tl.load(Column + begin)
    for visit in range(begin, masked):
        next_tile = tl.load(Column + visit + 1)
        acc, top, total = _attend(
            acc, top, total, q, K, V, Exit, Depth, query, query_depth, key_tile,
            k_row, v_row, keys, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, KEY_TILE, HAS_SOFTCAP, HAS_WINDOW, False, PRECISION,
        )  # fmt: skip
        key_tile = next_tile
    for visit in range(masked, end):
        next_tile = tl.load(Column + visit + 1)
        acc, top, total = _attend(
            acc, top, total, q, K, V, Exit, Depth, query, query_depth, key_tile,
            k_row, v_row, keys, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, KEY_TILE, HAS_SOFTCAP, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
        key_tile = next_tile

    if HAS_SINKS:
        sink = tl.load(Sinks + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - new_top)
        top = new_top
    total = tl.where(row < queries, total, 1.0)
    store_rows(Out + head * out_head, row, out_row, queries, acc / total[:, None], DV, SHARE_DV, first)
    if first == 0:
        tl.store(Lse + head * queries + row, (top + tl.log2(total)) * LN_2, mask=row < queries)
