"""Chunks of streamed execution: every token once, within the budget, each behind ancestors that are in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.execution.streaming.chunk_plan import CachedPath, ChunkPlan
from dta_plugin.execution.streaming.chunking import plan_chunks
from tests.support.blocks import with_blocks, with_random_blocks
from tests.support.trees import SHAPES, WIDE, Sequences, binary, branching_comb, run, sequence_batches, star


def chunk_of_token(tree: PrefixTree, plan: ChunkPlan) -> np.ndarray:
    tokens = np.concatenate([chunk.tokens for chunk in plan.chunks])
    assert np.array_equal(np.sort(tokens), np.arange(tree.tree_tokens))
    found = np.empty(tree.tree_tokens, dtype=np.int64)
    for index, chunk in enumerate(plan.chunks):
        found[chunk.tokens] = index
    return found


def check_plan(tree: PrefixTree, budget: int) -> ChunkPlan:
    plan = plan_chunks(tree, budget)
    chunk_of = chunk_of_token(tree, plan)
    most = max(budget, longest_block(tree))
    if tree.reach is not None:
        assert np.array_equal(chunk_of, chunk_of[tree.reach - 1]), "no block that attends both ways is cut"
    path = CachedPath(plan)
    for index, chunk in enumerate(plan.chunks):
        assert 0 < len(chunk) <= most and (np.diff(chunk.tokens) > 0).all()
        assert np.array_equal(tree.depth[chunk.tokens[chunk.cached]], chunk.first_depth + np.arange(len(chunk.cached)))
        above = tree.parent[chunk.tokens]
        (hangs_off,) = set(above[(above < 0) | (chunk_of[above] != index)].tolist())  # all of it off one token
        if hangs_off < 0:
            assert (chunk.parent, chunk.first_depth) == (-1, 0)
        else:
            parent = plan.chunks[chunk.parent]
            assert chunk.parent < index and hangs_off in parent.tokens[parent.cached]
            assert tree.depth[hangs_off] + 1 == chunk.first_depth
        assert list(path.restore(index)) == [], "the first pass needs nothing twice"
        path.run(index)
    kept = plan.chunks[plan.first_kept :]
    assert sum(map(len, kept)) <= budget and plan.peak_tokens <= most
    return plan


def longest_block(tree: PrefixTree) -> int:
    return 1 if tree.reach is None else int(np.unique(tree.reach, return_counts=True)[1].max())


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20, 10_000])
def test_every_shape(budget: int) -> None:
    for sequences in (SHAPES | WIDE).values():
        check_plan(PrefixTree.from_sequences(sequences), budget)


@given(sequence_batches(max_sequences=14, max_length=16), st.integers(1, 40))
def test_random_trees(sequences: Sequences, budget: int) -> None:
    check_plan(PrefixTree.from_sequences(sequences), budget)


@given(sequence_batches(max_sequences=14, max_length=20), st.integers(1, 40), st.integers(0, 10**6))
def test_random_trees_with_blocks_that_attend_both_ways(sequences: Sequences, budget: int, seed: int) -> None:
    check_plan(with_random_blocks(PrefixTree.from_sequences(sequences), seed, longest=2 + seed % 15), budget)


@pytest.mark.parametrize("start", range(0, 40, 3))
@pytest.mark.parametrize("length", [2, 15, 16, 17, 50])
def test_a_block_at_every_place_of_a_long_path(start: int, length: int) -> None:
    """One that fits is not cut; a longer one makes a chunk of its own size."""
    tree = with_blocks(PrefixTree.from_sequences([run(120)]), (start, start + length))
    plan = check_plan(tree, 16)
    assert max(map(len, plan.chunks)) == max(16, length)
    assert len(plan.chunks) <= len(check_plan(PrefixTree.from_sequences([run(120)]), 16).chunks) + 2


def test_a_tree_within_the_budget_is_one_chunk_that_keeps_its_graph() -> None:
    tree = PrefixTree.from_sequences(SHAPES["forest"])
    plan = check_plan(tree, tree.tree_tokens)
    assert (len(plan.chunks), plan.recomputed_tokens, plan.rebuilt_tokens) == (1, 0, 0)


def test_siblings_share_a_chunk() -> None:
    tree = PrefixTree.from_sequences(star(16, prefix=100, branch=20))
    assert sorted(map(len, check_plan(tree, 200).chunks)) == [20, 200, 200]


def test_small_answers_run_with_the_turn_they_hang_off() -> None:
    tree = PrefixTree.from_sequences(branching_comb(20, turn=10))
    assert len(check_plan(tree, 60).chunks) <= 1.2 * tree.tree_tokens / 60


def test_a_single_path_is_never_rebuilt() -> None:
    tree = PrefixTree.from_sequences([run(1000)])
    plan = check_plan(tree, 64)
    assert (len(plan.chunks), plan.rebuilt_tokens, plan.recomputed_tokens) == (17, 0, 1000 - 64)


def test_the_longest_trunk_comes_last() -> None:
    """Two large branches: only the shorter one's stem runs again."""
    short = [[1, 2, 3, *sequence] for sequence in star(4, prefix=20, branch=30)]
    long = [[1, 2, 4, *sequence] for sequence in star(4, prefix=40, branch=30)]
    for sequences in (short + long, [[*s[:2], 7 - s[2], *s[3:]] for s in short + long]):
        assert check_plan(PrefixTree.from_sequences(sequences), 64).rebuilt_tokens < 40


def test_keys_in_memory_are_bounded_by_the_longest_path() -> None:
    for levels in (4, 6, 8):
        tree = PrefixTree.from_sequences(binary(levels, node=8))
        assert check_plan(tree, 32).arena_tokens <= 8 * levels + 32


@pytest.mark.parametrize(
    ("sequences", "budget", "kept"),
    [
        ([run(1000)], 64, 64),  # a long path: its last tokens
        (star(16, prefix=100, branch=20), 210, 200),  # siblings: as many whole ones as fit
        (star(5, prefix=30, branch=7), 62, 35),  # branches off the end of a stem
        (star(16, prefix=100, branch=20), 215, 200),  # less than an eighth of the budget is not worth a call
    ],
)
def test_what_fits_of_the_chunk_at_the_edge_is_kept(sequences: Sequences, budget: int, kept: int) -> None:
    plan = check_plan(PrefixTree.from_sequences(sequences), budget)
    assert sum(map(len, plan.chunks[plan.first_kept :])) == kept, [len(c) for c in plan.chunks]


def test_unkept() -> None:
    plan = plan_chunks(PrefixTree.from_sequences(SHAPES["forest"]), 5, keeps_graphs=False)
    assert plan.recomputed_tokens == plan.tokens and plan.first_kept == len(plan.chunks)


def test_no_budget() -> None:
    with pytest.raises(InvalidInputError, match=r"budget of 0 tokens per chunk. Expected at least 1"):
        plan_chunks(PrefixTree.from_sequences(SHAPES["forest"]), 0)


def test_deep_trees_need_no_recursion() -> None:
    tree = PrefixTree.from_sequences(branching_comb(1200, turn=1))
    check_plan(tree, 50)
