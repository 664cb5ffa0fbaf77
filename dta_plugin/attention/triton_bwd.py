"""Backward kernels of tree attention in Triton: dQ per query tile, dK and dV per key tile. No atomics.

In depth-first layout the queries of a key tile are one interval, so every key tile has one owner and two runs are
bitwise equal. Key tiles that very many queries see, those of a root, are split over several programs; their float32
partial sums are added by a third kernel in a fixed order. dK and dV are *added* to float32 buffers, which lets the
keys of ancestors collect gradients chunk by chunk. The equations are those of FlashAttention-2 (arXiv 2307.08691,
algorithm 2), in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dta_plugin.attention.triton_fwd import (
    DYNAMIC,
    LOG2_E,
    WIDEST,
    capped,
    first_column,
    is_visible,
    load_rows,
    store_rows,
    zeros,
)


@triton.jit(do_not_specialize=DYNAMIC)
def delta_kernel(
    Out, Grad, Delta, out_head, out_row, grad_head, grad_row, queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Delta float32 [Hq, queries]: the inner product of output and its gradient. Grid (Hq, tiles of queries)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    out = load_rows(Out + head * out_head, row, out_row, queries, DV, BLOCK_DV, True).to(tl.float32)
    grad = load_rows(Grad + head * grad_head, row, grad_row, queries, DV, BLOCK_DV, True).to(tl.float32)
    tl.store(Delta + head * queries + row, tl.sum(out * grad, axis=1), mask=row < queries)


@triton.jit
def _weights(product, scale, softcap, lse, HAS_SOFTCAP: tl.constexpr):
    """q.k -> (attention weights, d(score) / d(scale * q.k)); lse broadcasts, in base 2."""
    if HAS_SOFTCAP:
        squashed = capped(product, scale, softcap)
        return tl.exp2(squashed * (softcap * LOG2_E) - lse), 1.0 - squashed * squashed
    else:
        return tl.exp2(product * (scale * LOG2_E) - lse), 1.0


@triton.jit
def _query_gradient(
    acc, q, grad, K, V, KeyTiles, ValueTiles, Exit, Depth, query, query_depth, lse, delta, kv_head, tile,
    k_row, v_row, keys, first, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, KEY_TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    if KeyTiles is None:
        k = load_rows(K, key, k_row, keys, D, BLOCK_D, MASKED)
        v = load_rows(V, key, v_row, keys, DV, BLOCK_DV, MASKED)
    else:
        k = KeyTiles.load([kv_head, tile * KEY_TILE, 0]).reshape(KEY_TILE, BLOCK_D)
        v = ValueTiles.load([kv_head, tile * KEY_TILE, 0]).reshape(KEY_TILE, BLOCK_DV)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weight, slope = _weights(product, scale, softcap, lse[:, None], HAS_SOFTCAP)
    if MASKED:
        weight = tl.where(is_visible(query, query_depth, key, Exit, Depth, keys, window, HAS_WINDOW), weight, 0.0)
    weighted_slope = weight * slope  # now, so that the two need not both be kept
    grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_score = weighted_slope * (grad_weight - delta[:, None])
    if BLOCK_D > WIDEST:
        k = load_rows(K, key, k_row, keys, D, WIDEST, MASKED, first)
    return tl.dot(grad_score.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=DYNAMIC)
def query_gradient_kernel(
    Q, K, V, KeyTiles, ValueTiles, Grad, GradQ, Lse, Delta, Exit, Depth, Order, Start, Masked, Column,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, gradq_head, gradq_row,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradQ [Hq, queries, D] in q's dtype. Grid (Hq, query tiles, shares of D).

    KeyTiles, ValueTiles: descriptors [Hkv, keys, D] and [Hkv, keys, DV] through which full tiles are read, or None.
    """
    SHARE_D: tl.constexpr = BLOCK_D if BLOCK_D < WIDEST else WIDEST
    head = tl.program_id(0).to(tl.int64)
    tile = tl.load(Order + tl.program_id(1))
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query = first_query + row
    q = load_rows(Q + head * q_head, row, q_row, queries, D, BLOCK_D, True)
    grad = load_rows(Grad + head * grad_head, row, grad_row, queries, DV, BLOCK_DV, True)
    lse = tl.load(Lse + head * queries + row, mask=row < queries, other=0.0) * LOG2_E
    delta = tl.load(Delta + head * queries + row, mask=row < queries, other=0.0)
    query_depth = tl.load(Depth + query, mask=row < queries, other=0)
    kv_head = tl.program_id(0) // GROUPS
    K += (head // GROUPS) * k_head
    V += (head // GROUPS) * v_head
    first = first_column(BLOCK_D)

    acc = zeros(QUERY_TILE, SHARE_D, scale)
    begin = tl.load(Start + tile)
    masked = tl.load(Masked + tile)
    end = tl.load(Start + tile + 1)
    key_tile = tl.load(Column + begin)
    for visit in range(begin, masked):
        next_tile = tl.load(Column + visit + 1)
        acc = _query_gradient(
            acc, q, grad, K, V, KeyTiles, ValueTiles, Exit, Depth, query, query_depth, lse, delta, kv_head, key_tile,
            k_row, v_row, keys, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, KEY_TILE, HAS_SOFTCAP, HAS_WINDOW, False, PRECISION,
        )  # fmt: skip
        key_tile = next_tile
    for visit in range(masked, end):
        next_tile = tl.load(Column + visit + 1)
        acc = _query_gradient(
            acc, q, grad, K, V, KeyTiles, ValueTiles, Exit, Depth, query, query_depth, lse, delta, kv_head, key_tile,
            k_row, v_row, keys, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, KEY_TILE, HAS_SOFTCAP, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
        key_tile = next_tile
    store_rows(GradQ + head * gradq_head, row, gradq_row, queries, acc * scale, D, SHARE_D, first)


@triton.jit
def _load_values(base, row, rows, CHECKED: tl.constexpr):
    return tl.load(base + row, mask=row < rows, other=0.0) if CHECKED else tl.load(base + row)


@triton.jit
def _key_gradient(
    acc_k, acc_v, k, v, Q, Grad, Lse, Delta, Depth, key, key_exit, key_depth, tile,
    q_row, grad_row, queries, first_query, first, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores are computed transposed, [keys, queries], so that no operand of a product needs a transposition."""
    SHARE_DV: tl.constexpr = BLOCK_DV if BLOCK_DV < WIDEST else WIDEST
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    q = load_rows(Q, row, q_row, queries, D, BLOCK_D, MASKED)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = _load_values(Lse, row, queries, MASKED) * LOG2_E
    weight, slope = _weights(product, scale, softcap, lse[None, :], HAS_SOFTCAP)
    if MASKED:
        query = first_query + row
        visible = (key[:, None] <= query[None, :]) & (query[None, :] < key_exit[:, None]) & (row < queries)[None, :]
        if HAS_WINDOW:
            query_depth = tl.load(Depth + query, mask=row < queries, other=0)
            visible = visible & (query_depth[None, :] - key_depth[:, None] < window)
        weight = tl.where(visible, weight, 0.0)
    if KEYS:
        weighted_slope = weight * (slope * scale)  # now, so that the two need not both be kept
        grad = load_rows(Grad, row, grad_row, queries, DV, BLOCK_DV, MASKED)
    else:
        grad = load_rows(Grad, row, grad_row, queries, DV, SHARE_DV, MASKED, first)
    if VALUES:
        acc_v = tl.dot(weight.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
    if KEYS:
        grad_weight = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        delta = _load_values(Delta, row, queries, MASKED)
        grad_score = weighted_slope * (grad_weight - delta[None, :])
        if BLOCK_D > WIDEST:
            q = load_rows(Q, row, q_row, queries, D, WIDEST, MASKED, first)
        acc_k = tl.dot(grad_score.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=DYNAMIC)
def key_gradient_kernel(
    Q, K, V, Grad, GradK, GradV, PartK, PartV, Lse, Delta, Exit, Depth,
    WorkTile, WorkBegin, WorkEnd, WorkSlot, Start, Masked, Column,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, gradk_head, gradk_row, gradv_head, gradv_row,
    queries, keys, first_query, scale, softcap, window,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to GradK float32 [Hkv, keys, D] and GradV [Hkv, keys, DV], or write to a slot of PartK and PartV.

    Grid (Hkv, programs of KeyWork, shares of the gradient's columns). A unit of work is one query tile of one head of
    the group. KEYS, VALUES: which of the two gradients this pass computes; where heads are wide, both do not fit into
    registers at once.
    """
    SHARE_D: tl.constexpr = BLOCK_D if BLOCK_D < WIDEST else WIDEST
    SHARE_DV: tl.constexpr = BLOCK_DV if BLOCK_DV < WIDEST else WIDEST
    head = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1)
    tile = tl.load(WorkTile + item)
    begin = tl.load(WorkBegin + item)
    end = tl.load(WorkEnd + item)
    first_full = tl.load(Start + tile)
    first_masked = tl.load(Masked + tile)
    fulls = first_masked - first_full
    maskeds = tl.load(Start + tile + 1) - first_masked
    full_units = fulls * GROUPS
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    k = load_rows(K + head * k_head, key, k_row, keys, D, BLOCK_D, True)
    first = first_column(BLOCK_D if KEYS else BLOCK_DV)

    # Starting from the totals costs fewer registers than adding to them at the end.
    slot = tl.load(WorkSlot + item)
    owned = tl.where(slot < 0, keys, 0)
    if KEYS:
        v = load_rows(V + head * v_head, key, v_row, keys, DV, BLOCK_DV, True)
        acc_k = load_rows(GradK + head * gradk_head, key, gradk_row, owned, D, SHARE_D, True, first)
    else:
        v = tl.zeros([1, 1], tl.float32)
        acc_k = tl.zeros([1, 1], tl.float32)
    if not VALUES:
        acc_v = tl.zeros([1, 1], tl.float32)
    else:
        acc_v = load_rows(GradV + head * gradv_head, key, gradv_row, owned, DV, SHARE_DV, True, first)
    visit = begin % tl.maximum(fulls, 1)
    q_of = head * GROUPS + begin // tl.maximum(fulls, 1)
    query_tile = tl.load(Column + first_full + visit)
    for _unit in range(begin, tl.minimum(end, full_units)):
        next_visit, next_q = _next(visit, fulls, q_of)
        next_tile = tl.load(Column + first_full + next_visit)
        acc_k, acc_v = _key_gradient(
            acc_k, acc_v, k, v, Q + q_of * q_head, Grad + q_of * grad_head, Lse + q_of * queries,
            Delta + q_of * queries, Depth, key, None, None, query_tile,
            q_row, grad_row, queries, first_query, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, QUERY_TILE, KEYS, VALUES, HAS_SOFTCAP, HAS_WINDOW, False, PRECISION,
        )  # fmt: skip
        visit, q_of, query_tile = next_visit, next_q, next_tile
    key_exit = tl.load(Exit + key, mask=key < keys, other=0)
    key_depth = tl.load(Depth + key, mask=key < keys, other=0)
    begin = tl.maximum(begin - full_units, 0)
    visit = begin % tl.maximum(maskeds, 1)
    q_of = head * GROUPS + begin // tl.maximum(maskeds, 1)
    query_tile = tl.load(Column + first_masked + visit)
    for _unit in range(begin, end - full_units):
        next_visit, next_q = _next(visit, maskeds, q_of)
        next_tile = tl.load(Column + first_masked + next_visit)
        acc_k, acc_v = _key_gradient(
            acc_k, acc_v, k, v, Q + q_of * q_head, Grad + q_of * grad_head, Lse + q_of * queries,
            Delta + q_of * queries, Depth, key, key_exit, key_depth, query_tile,
            q_row, grad_row, queries, first_query, first, scale, softcap, window,
            D, BLOCK_D, DV, BLOCK_DV, QUERY_TILE, KEYS, VALUES, HAS_SOFTCAP, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
        visit, q_of, query_tile = next_visit, next_q, next_tile
    if KEYS:
        _deliver(
            acc_k, GradK + head * gradk_head, gradk_row, PartK, key, keys, slot, head, D, SHARE_D,
            KEY_TILE, first,
        )  # fmt: skip
    if VALUES:
        _deliver(
            acc_v, GradV + head * gradv_head, gradv_row, PartV, key, keys, slot, head, DV, SHARE_DV,
            KEY_TILE, first,
        )  # fmt: skip


@triton.jit
def _next(visit, visits, q_of):
    """(visit, query head) of the next unit of work: after a head's last visit comes the next head."""
    last = visit == visits - 1
    return tl.where(last, 0, visit + 1), q_of + last


@triton.jit
def _deliver(
    acc, Total, total_row, Part, key, keys, slot, head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEY_TILE: tl.constexpr, first,
):  # fmt: skip
    """Write the tile's rows of Total, or slot `slot` of Part [slots, Hkv, KEY_TILE, WIDTH], from column `first` on."""
    if slot < 0:
        store_rows(Total, key, total_row, keys, acc, WIDTH, BLOCK, first)
    else:
        place = Part + (slot.to(tl.int64) * tl.num_programs(0) + head) * KEY_TILE * WIDTH
        store_rows(place, tl.arange(0, KEY_TILE), WIDTH, KEY_TILE, acc, WIDTH, BLOCK, first)


@triton.jit(do_not_specialize=DYNAMIC)
def reduce_kernel(
    Part, Total, SplitTile, SplitStart, total_head, total_row, keys,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Total [Hkv, keys, WIDTH] += the partial sums of each split key tile, in slot order. Grid (Hkv, splits)."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    key = tl.load(SplitTile + split) * KEY_TILE + tl.arange(0, KEY_TILE)
    Total += head * total_head
    acc = load_rows(Total, key, total_row, keys, WIDTH, BLOCK, True)
    for slot in range(tl.load(SplitStart + split), tl.load(SplitStart + split + 1)):
        place = Part + (tl.full([], slot, tl.int64) * tl.num_programs(0) + head) * KEY_TILE * WIDTH
        acc += load_rows(place, tl.arange(0, KEY_TILE), WIDTH, KEY_TILE, WIDTH, BLOCK, False)
    store_rows(Total, key, total_row, keys, acc, WIDTH, BLOCK)
