"""Forward kernel of tree attention in Triton.

One program per query tile and head runs an online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1) over the
key tiles that `attention/tiles.py` lists for it. Full tiles have neither mask nor bounds checks; masked tiles test
``key <= query < exit[key]``, or what blocks that attend both ways make of it, and the window.

K and V may hold more rows than Q: queries are then the last rows of the layout, `first_query` the index of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dta_plugin.attention.triton_parts import (
    DYNAMIC,
    LN_2,
    LOG2_E,
    capped,
    first_column,
    is_visible,
    load_rows,
    load_values,
    store_rows,
    visits_of,
    zeros,
)


@triton.jit
def _attend(
    acc, top, total, q, K, V, Exit, Depth, query, last, near, query_depth, head, tile, keys, first,
    scale, softcap, window,
    KEY_TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: (acc, top, total) after the keys of `tile`."""
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    k = load_rows(K, head, key, keys, MASKED)
    v = load_rows(V, head, key, keys, MASKED, first)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if softcap is None:
        to_base_2 = scale * LOG2_E
    else:
        score = capped(score, scale, softcap)
        to_base_2 = softcap * LOG2_E
    if MASKED:
        visible = is_visible(query, last, near, query_depth, key, Exit, Depth, keys, window)
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
    Q, K, V, Out, Lse, Sinks, Exit, Depth, Last, Near, Order, Start, Masked, Column,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out [Hq, queries, DV] and Lse float32 [Hq, queries], natural logarithm. Grid (Hq, query tiles, shares of DV).

    Last, Near: int32 [keys] the last key that each token may see, and the first that it sees whatever the window; None
    where that is itself, and where there is no such key.
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.load(Order + tl.program_id(1))
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query = first_query + row
    q = load_rows(Q, head, row, queries, True)
    query_depth = tl.load(Depth + query, mask=row < queries, other=0)
    last, near = query, None
    if Last is not None:
        last = load_values(Last, query, keys, True)
    if Near is not None:
        near = load_values(Near, query, keys, True)
    first = first_column(V)

    acc = zeros(QUERY_TILE, V.share, scale)
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    visits = visits_of(tile, Start, Masked)
    key_tile = tl.load(Column + visits[0])
    for MASKED in tl.static_range(2):
        for visit in range(visits[MASKED], visits[MASKED + 1]):
            next_tile = tl.load(Column + visit + 1)
            acc, top, total = _attend(
                acc, top, total, q, K, V, Exit, Depth, query, last, near, query_depth, head // GROUPS, key_tile,
                keys, first, scale, softcap, window, KEY_TILE, MASKED, PRECISION,
            )  # fmt: skip
            key_tile = next_tile

    if Sinks is not None:
        sink = tl.load(Sinks + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - new_top)
        top = new_top
    total = tl.where(row < queries, total, 1.0)
    store_rows(Out, head, row, queries, acc / total[:, None], first)
    if first == 0:
        tl.store(Lse + head * queries + row, (top + tl.log2(total)) * LN_2, mask=row < queries)
