"""Backward kernels of tree attention in Triton: dQ per query tile, dK and dV per key tile. No atomics.

In depth-first layout the queries of a key tile are one interval, also where blocks attend both ways, so every key tile
has one owner and two runs are bitwise equal. Key tiles that very many queries see, those of a root, are split over
several programs; their float32 partial sums are added by a third kernel in a fixed order. dK and dV are *added* to
float32 buffers, which lets the keys of ancestors collect gradients chunk by chunk. The equations are those of
FlashAttention-2 (arXiv 2307.08691, algorithm 2), in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dta_plugin.attention.triton_parts import (
    DYNAMIC,
    LOG2_E,
    capped,
    first_column,
    is_visible,
    load_at,
    load_rows,
    load_values,
    sees,
    store_rows,
    visits_of,
    zeros,
)


@triton.jit(do_not_specialize=DYNAMIC)
def delta_kernel(Out, Grad, Delta, queries, TILE: tl.constexpr):
    """Delta float32 [Hq, queries]: the inner product of output and its gradient. Grid (Hq, tiles of queries)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    out = load_rows(Out, head, row, queries, True).to(tl.float32)
    grad = load_rows(Grad, head, row, queries, True).to(tl.float32)
    tl.store(Delta + head * queries + row, tl.sum(out * grad, axis=1), mask=row < queries)


@triton.jit
def _weights(product, scale, softcap, lse):
    """q.k -> (attention weights, d(score) / d(scale * q.k)); lse broadcasts, in base 2."""
    if softcap is None:
        return tl.exp2(product * (scale * LOG2_E) - lse), 1.0
    else:
        squashed = capped(product, scale, softcap)
        return tl.exp2(squashed * (softcap * LOG2_E) - lse), 1.0 - squashed * squashed


@triton.jit
def _query_gradient(
    acc, q, grad, K, V, KeyTiles, ValueTiles, Exit, Depth, query, last, near, query_depth, lse, delta, head, tile,
    keys, first, scale, softcap, window,
    KEY_TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc with what the keys of `tile` add."""
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    if KeyTiles is None:
        k = load_rows(K, head, key, keys, MASKED)
        v = load_rows(V, head, key, keys, MASKED)
    else:
        k = KeyTiles.load([head.to(tl.int32), tile * KEY_TILE, 0]).reshape(KEY_TILE, K.block)
        v = ValueTiles.load([head.to(tl.int32), tile * KEY_TILE, 0]).reshape(KEY_TILE, V.block)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weight, slope = _weights(product, scale, softcap, lse[:, None])
    if MASKED:
        visible = is_visible(query, last, near, query_depth, key, Exit, Depth, keys, window)
        weight = tl.where(visible, weight, 0.0)
    weighted_slope = weight * slope  # now, so that the two need not both be kept
    grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_score = weighted_slope * (grad_weight - delta[:, None])
    if K.block > K.share:
        k = load_rows(K, head, key, keys, MASKED, first)
    return tl.dot(grad_score.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=DYNAMIC)
def query_gradient_kernel(
    Q, K, V, Grad, GradQ, KeyTiles, ValueTiles, Lse, Delta, Exit, Depth, Last, Near, Order, Start, Masked, Column,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradQ [Hq, queries, D] in q's dtype. Grid (Hq, query tiles, shares of D).

    KeyTiles, ValueTiles: descriptors [Hkv, keys, D] and [Hkv, keys, DV] through which full tiles are read, or None.
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.load(Order + tl.program_id(1))
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query = first_query + row
    q = load_rows(Q, head, row, queries, True)
    grad = load_rows(Grad, head, row, queries, True)
    lse = load_values(Lse + head * queries, row, queries, True) * LOG2_E
    delta = load_values(Delta + head * queries, row, queries, True)
    query_depth = tl.load(Depth + query, mask=row < queries, other=0)
    last, near = query, None
    if Last is not None:
        last = load_values(Last, query, keys, True)
    if Near is not None:
        near = load_values(Near, query, keys, True)
    first = first_column(GradQ)

    acc = zeros(QUERY_TILE, GradQ.share, scale)
    visits = visits_of(tile, Start, Masked)
    key_tile = tl.load(Column + visits[0])
    for MASKED in tl.static_range(2):
        for visit in range(visits[MASKED], visits[MASKED + 1]):
            next_tile = tl.load(Column + visit + 1)
            acc = _query_gradient(
                acc, q, grad, K, V, KeyTiles, ValueTiles, Exit, Depth, query, last, near, query_depth, lse, delta,
                head // GROUPS, key_tile, keys, first, scale, softcap, window, KEY_TILE, MASKED, PRECISION,
            )  # fmt: skip
            key_tile = next_tile
    store_rows(GradQ, head, row, queries, acc * scale, first)


@triton.jit
def _key_gradient(
    acc_k, acc_v, k, v, Q, Grad, Lse, Delta, Depth, Last, Near, key, key_exit, key_depth, head, tile,
    queries, keys, first_query, first, scale, softcap, window,
    QUERY_TILE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc_k, acc_v) with what the queries of `tile` add.

    Scores are computed transposed, [keys, queries], so that no operand of a product needs a transposition.
    """
    # All addresses first, which costs fewer registers than each at its load.
    q_base, grad_base = Q.base + head * Q.head_stride, Grad.base + head * Grad.head_stride
    Lse += head * queries
    Delta += head * queries
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    q = load_at(q_base, Q, row, queries, MASKED)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = load_values(Lse, row, queries, MASKED) * LOG2_E
    weight, slope = _weights(product, scale, softcap, lse[None, :])
    if MASKED:
        query = first_query + row
        query_depth = tl.load(Depth + query, mask=row < queries, other=0)
        last, near = query, None
        if Last is not None:
            last = load_values(Last, query, keys, True)
        if Near is not None:
            near = load_values(Near, query, keys, True)
        visible = sees(query, last, near, query_depth, key, key_exit, key_depth, window, 0)
        weight = tl.where(visible & (row < queries)[None, :], weight, 0.0)
    if KEYS:
        weighted_slope = weight * (slope * scale)  # now, so that the two need not both be kept
        grad = load_at(grad_base, Grad, row, queries, MASKED)
    else:
        grad = load_at(grad_base, Grad, row, queries, MASKED, first)
    if VALUES:
        acc_v = tl.dot(weight.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
    if KEYS:
        grad_weight = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        delta = load_values(Delta, row, queries, MASKED)
        grad_score = weighted_slope * (grad_weight - delta[None, :])
        if Q.block > Q.share:
            q = load_at(q_base, Q, row, queries, MASKED, first)
        acc_k = tl.dot(grad_score.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=DYNAMIC)
def key_gradient_kernel(
    Q, K, V, Grad, GradK, GradV, PartK, PartV, Lse, Delta,
    WorkTile, WorkBegin, WorkEnd, WorkSlot, Start, Masked, Column, Exit, Depth, Last, Near,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Add to GradK float32 [Hkv, keys, D] and GradV [Hkv, keys, DV], or write to a slot of PartK and PartV.

    Grid (Hkv, programs of KeyWork, shares of the gradient's columns). A unit of work is one query tile of one head of
    the group. KEYS, VALUES: which of the two gradients this pass computes; where heads are wide, both do not fit into
    registers at once.
    """
    head = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1)
    tile = tl.load(WorkTile + item)
    begin = tl.load(WorkBegin + item)
    end = tl.load(WorkEnd + item)
    visits = visits_of(tile, Start, Masked)
    counts = visits[1] - visits[0], visits[2] - visits[1]
    full_units = counts[0] * GROUPS
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    k = load_rows(K, head, key, keys, True)
    first = first_column(K if KEYS else V)

    # Starting from the totals costs fewer registers than adding to them at the end.
    slot = tl.load(WorkSlot + item)
    owned = tl.where(slot < 0, keys, 0)
    v, acc_k, acc_v = tl.zeros([1, 1], tl.float32), tl.zeros([1, 1], tl.float32), tl.zeros([1, 1], tl.float32)
    if KEYS:
        v = load_rows(V, head, key, keys, True)
        acc_k = load_rows(GradK, head, key, owned, True, first)
    if VALUES:
        acc_v = load_rows(GradV, head, key, owned, True, first)

    key_exit, key_depth = None, None
    for MASKED in tl.static_range(2):
        if MASKED:
            key_exit, key_depth = load_values(Exit, key, keys, True), load_values(Depth, key, keys, True)
        first_visit, count = visits[MASKED], counts[MASKED]
        visit = begin % tl.maximum(count, 1)
        q_of = head * GROUPS + begin // tl.maximum(count, 1)
        query_tile = tl.load(Column + first_visit + visit)
        for _unit in range(begin, end if MASKED else tl.minimum(end, full_units)):
            next_visit, next_q = _next(visit, count, q_of)
            next_tile = tl.load(Column + first_visit + next_visit)
            acc_k, acc_v = _key_gradient(
                acc_k, acc_v, k, v, Q, Grad, Lse, Delta, Depth, Last, Near, key, key_exit, key_depth, q_of, query_tile,
                queries, keys, first_query, first, scale, softcap, window, QUERY_TILE, KEYS, VALUES, MASKED, PRECISION,
            )  # fmt: skip
            visit, q_of, query_tile = next_visit, next_q, next_tile
        begin, end = tl.maximum(begin - full_units, 0), end - full_units
    if KEYS:
        _deliver(acc_k, GradK, PartK, key, keys, slot, head, KEY_TILE, first)
    if VALUES:
        _deliver(acc_v, GradV, PartV, key, keys, slot, head, KEY_TILE, first)


@triton.jit
def _next(visit, visits, q_of):
    """(visit, query head) of the next unit of work: after a head's last visit comes the next head."""
    last = visit == visits - 1
    return tl.where(last, 0, visit + 1), q_of + last


@triton.jit
def _deliver(acc, Total, Part, key, keys, slot, head, KEY_TILE: tl.constexpr, first):
    """Write the tile's rows of Total, or slot `slot` of Part [slots * Hkv, KEY_TILE, width], from column `first` on."""
    if slot < 0:
        store_rows(Total, head, key, keys, acc, first)
    else:
        place = slot.to(tl.int64) * tl.num_programs(0) + head
        store_rows(Part, place, tl.arange(0, KEY_TILE), KEY_TILE, acc, first)


@triton.jit(do_not_specialize=DYNAMIC)
def reduce_kernel(Part, Total, SplitTile, SplitStart, keys, KEY_TILE: tl.constexpr):
    """Total [Hkv, keys, width] += the partial sums of each split key tile, in slot order.

    Grid (Hkv, splits, shares of the columns).
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = first_column(Total)
    key = tl.load(SplitTile + split) * KEY_TILE + tl.arange(0, KEY_TILE)
    acc = load_rows(Total, head, key, keys, True, first)
    for slot in range(tl.load(SplitStart + split), tl.load(SplitStart + split + 1)):
        place = tl.full([], slot, tl.int64) * tl.num_programs(0) + head
        acc += load_rows(Part, place, tl.arange(0, KEY_TILE), KEY_TILE, False, first)
    store_rows(Total, head, key, keys, acc, first)
