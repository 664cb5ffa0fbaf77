"""The GPU kernels' schedule: every visible pair is visited, hidden tiles are not, and the work is spread evenly."""

from __future__ import annotations

import heapq
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import PrefixTree, TreeMask
from dta_plugin.attention import tiles
from dta_plugin.attention.tiles import KeyWork, TilePairs, Visits, key_work, tile_pairs, visits
from tests.support.attention_variants import mask_of
from tests.support.blocks import RULES, block_mask, mask_of_tree, with_blocks
from tests.support.trees import SHAPES, WIDE, Sequences, branching_comb, fork_at, run, sequence_batches, star

FORKS = {f"fork_{offset}": fork_at(offset, tail=5) for offset in range(1, 18)}
TILES = [(4, 8), (8, 4), (8, 8), (16, 16)]
PROCESSORS = 132  # of an H200


def pairs_of(mask: TreeMask, query_tile: int, key_tile: int, window: int | None = None, first: int = 0) -> TilePairs:
    return tile_pairs(*mask.host(), window, query_tile, key_tile, first, mask.blocks())


def tiled(mask: TreeMask, query_tile: int, key_tile: int, window: int | None, first: int) -> np.ndarray:
    """Visible pairs by tile, [query tiles, key tiles, query_tile * key_tile]; padding counts as hidden."""
    visible = mask.visible(window).numpy()[first:]
    padded = np.zeros(
        (-(-visible.shape[0] // query_tile) * query_tile, -(-len(mask) // key_tile) * key_tile), dtype=bool
    )
    padded[: visible.shape[0], : visible.shape[1]] = visible
    blocks = padded.reshape(-1, query_tile, padded.shape[1] // key_tile, key_tile)
    return blocks.transpose(0, 2, 1, 3).reshape(blocks.shape[0], blocks.shape[2], -1)


def check_pairs(sequences: Sequences, query_tile: int, key_tile: int, window: int | None, first: int) -> None:
    check_pairs_of(mask_of(sequences), query_tile, key_tile, window, first)


def check_pairs_of(mask: TreeMask, query_tile: int, key_tile: int, window: int | None, first: int) -> None:
    pairs = pairs_of(mask, query_tile, key_tile, window, first)
    blocks = tiled(mask, query_tile, key_tile, window, first)
    visited = np.zeros(blocks.shape[:2], dtype=int)
    np.add.at(visited, (pairs.query, pairs.key), 1)
    assert visited.max() <= 1
    assert (visited[blocks.any(axis=2)] == 1).all()
    if window is None:
        assert np.array_equal(visited == 1, blocks.any(axis=2))
    full = np.zeros(blocks.shape[:2], dtype=bool)
    full[pairs.query[pairs.full], pairs.key[pairs.full]] = True
    assert not (full & ~blocks.all(axis=2)).any()
    if window is None:
        assert np.array_equal(full, blocks.all(axis=2))


@pytest.mark.parametrize("query_tile,key_tile", TILES)
@pytest.mark.parametrize("window", [None, 1, 6])
def test_every_shape(query_tile: int, key_tile: int, window: int | None) -> None:
    for sequences in (SHAPES | FORKS).values():
        check_pairs(sequences, query_tile, key_tile, window, first=0)
    for sequences in WIDE.values():
        check_pairs(sequences, 64, 64, window, first=0)


@given(
    sequence_batches(max_sequences=12, max_length=24),
    st.sampled_from(TILES),
    st.sampled_from([None, 1, 5]),
    st.floats(0, 0.99),
)
def test_random_trees_and_chunks(
    sequences: Sequences, tile: tuple[int, int], window: int | None, share_of_ancestors: float
) -> None:
    check_pairs(sequences, *tile, window, first=int(share_of_ancestors * len(mask_of(sequences))))


@given(
    sequence_batches(max_sequences=12, max_length=24),
    st.sampled_from(TILES),
    st.sampled_from([None, 1, 5]),
    st.floats(0, 0.99),
    st.integers(0, 10**6),
)
def test_random_trees_with_blocks_that_attend_both_ways(
    sequences: Sequences, tile: tuple[int, int], window: int | None, share_of_ancestors: float, seed: int
) -> None:
    mask = block_mask(sequences, seed, longest=20, rule=RULES[seed % 2])
    check_pairs_of(mask, *tile, window, first=int(share_of_ancestors * len(mask)))


@pytest.mark.parametrize("query_tile,key_tile", TILES)
@pytest.mark.parametrize("length", [2, 7, 8, 9, 20])
def test_blocks_at_every_offset_of_a_tile(query_tile: int, key_tile: int, length: int) -> None:
    tree = PrefixTree.from_sequences(fork_at(50, tail=5))
    for start in range(50 - length + 1):
        for rule, window in ((RULES[0], None), (RULES[0], 5), (RULES[1], 5), (RULES[1], 30)):
            mask = mask_of_tree(with_blocks(tree, (start, start + length)), rule)
            check_pairs_of(mask, query_tile, key_tile, window, first=0)
            check_pairs_of(mask, query_tile, key_tile, window, first=start)


@pytest.mark.parametrize("window", [None, 5])
def test_lists_hold_the_pairs_full_ones_first(window: int | None) -> None:
    mask = mask_of(star(9, prefix=70, branch=20))
    pairs = pairs_of(mask, 8, 16, window)
    by_query = visits(pairs.query, pairs.key, pairs.full, -(-len(mask) // 8))
    by_key = visits(pairs.key, pairs.query, pairs.full, -(-len(mask) // 16))
    expected = {(q, k): f for q, k, f in zip(*(x.tolist() for x in (pairs.query, pairs.key, pairs.full)), strict=True)}
    for found, flip in ((by_query, False), (by_key, True)):
        listed = {}
        for row in range(len(found.order)):
            for place in range(int(found.start[row]), int(found.start[row + 1])):
                column = int(found.column[place])
                listed[(column, row) if flip else (row, column)] = place < int(found.masked[row])
        assert listed == expected
        lengths = found.start.diff()[found.order.long()]
        assert (lengths.diff() <= 0).all() and len(found.column) == len(expected) + 1


def work_of(
    sequences: Sequences, kv_heads: int, tile: tuple[int, int] = (64, 64), heads: int = 32
) -> tuple[Visits, KeyWork]:
    mask = mask_of(sequences)
    pairs = pairs_of(mask, *tile)
    by_key = visits(pairs.key, pairs.query, pairs.full, -(-len(mask) // tile[1]))
    return by_key, key_work(by_key, heads // kv_heads, kv_heads, PROCESSORS)


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_work_covers_every_unit_once(kv_heads: int) -> None:
    by_key, work = work_of(star(16, prefix=1024, branch=128), kv_heads)
    units = [[] for _ in by_key.order]
    slots = [[] for _ in by_key.order]
    for tile, begin, end, slot in zip(*(x.tolist() for x in (work.tile, work.begin, work.end, work.slot)), strict=True):
        units[tile] += range(begin, end)
        slots[tile].append(slot)
    groups = 32 // kv_heads
    for tile, length in enumerate(by_key.start.diff().tolist()):
        assert sorted(units[tile]) == list(range(length * groups))
        assert (slots[tile] == [-1]) if len(slots[tile]) == 1 else -1 not in slots[tile]
    for split, tile in enumerate(work.split_tile.tolist()):
        assert sorted(slots[tile]) == list(range(int(work.split_start[split]), int(work.split_start[split + 1])))
    assert work.slots == sum(len(s) for s in slots if len(s) > 1) > 0


def agentic(nodes: int, size: int) -> Sequences:
    """Every node continues one of the last twenty."""
    generator, paths = random.Random(0), [run(size)]
    for index in range(1, nodes):
        paths.append(generator.choice(paths[-20:]) + run(size, seed=index))
    return paths


LOADS: dict[str, Sequences] = {
    "prompt 1k, 16 x 128": star(16, 1024, 128),
    "prompt 512, 64 x 4k": star(64, 512, 4096),
    "prompt 16k, 16 x 2k": star(16, 16384, 2048),
    "prompt 4k, 32 x 2k": star(32, 4096, 2048),
    "agentic": agentic(200, 200),
    "comb": branching_comb(60, 500),
    "bushy": agentic(600, 24),
}


def makespan_over_ideal(costs: list[int]) -> float:
    """Programs start in order, each on the first free multiprocessor."""
    free = [0] * PROCESSORS
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free) * PROCESSORS / sum(costs)


@pytest.mark.parametrize("tile", [(32, 64), (64, 64), (64, 128)])
@pytest.mark.parametrize("load", LOADS)
def test_key_gradients_keep_every_multiprocessor_busy(load: str, tile: tuple[int, int]) -> None:
    for kv_heads in (1, 2, 4, 8):
        _, work = work_of(LOADS[load], kv_heads, tile)
        costs = (work.end - work.begin).repeat_interleave(kv_heads).tolist()
        assert makespan_over_ideal(costs) <= 1.1


@pytest.mark.parametrize("load", LOADS)
def test_queries_keep_every_multiprocessor_busy(load: str) -> None:
    mask = mask_of(LOADS[load])
    pairs = pairs_of(mask, 128, 64)
    by_query = visits(pairs.query, pairs.key, pairs.full, -(-len(mask) // 128))
    costs = by_query.start.diff()[by_query.order.long()].repeat_interleave(32).tolist()
    assert makespan_over_ideal(costs) <= 1.1


def test_negative_control_without_splits_a_root_leaves_the_gpu_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_SHARE_OF_FAIR_LOAD", 1000)
    _, work = work_of(LOADS["prompt 1k, 16 x 128"], kv_heads=1)
    assert makespan_over_ideal((work.end - work.begin).tolist()) > 4


def test_the_schedule_of_a_star_is_small() -> None:
    """Bytes of the lists of both directions, in a tree of 49,152 tokens whose T x T mask would take 2.4 GB."""
    mask = mask_of(LOADS["prompt 16k, 16 x 2k"])
    pairs = pairs_of(mask, 128, 64)
    by_query = visits(pairs.query, pairs.key, pairs.full, -(-len(mask) // 128))
    assert by_query.column.dtype == torch.int32 and by_query.column.nbytes < 0.4e6
