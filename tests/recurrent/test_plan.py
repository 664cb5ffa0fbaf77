"""Parents, ancestors and blocks of a row against the tree that it comes from."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.tree.trie import PrefixTree

_SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


@given(_SEQUENCES)
def test_parents_are_those_of_the_tree(sequences: list[list[int]]) -> None:
    tree = PrefixTree.from_sequences(sequences)
    assert StatePlan.from_depth(tree.depth).parent.tolist() == tree.parent.tolist()


@given(_SEQUENCES, st.integers(1, 4))
def test_ancestors_go_on_before_the_row(sequences: list[list[int]], count: int) -> None:
    tree = PrefixTree.from_sequences(sequences)
    found = StatePlan.from_depth(tree.depth).ancestors(count, torch.device("cpu")).tolist()
    for token in range(tree.tree_tokens):
        expected, place = [], token + count
        for _ in range(count):
            above = tree.parent[place - count] if place >= count else place - 1
            place = place - 1 if place < count else (above + count if above >= 0 else count - 1)
            expected.append(place)
        assert found[token] == expected


@given(_SEQUENCES, st.integers(1, 5), st.data())
def test_blocks(sequences: list[list[int]], size: int, data: st.DataObject) -> None:
    tree = PrefixTree.from_sequences(sequences)
    leaves = sorted(data.draw(st.sets(st.integers(0, tree.tree_tokens - 1), max_size=3)))
    blocks = StatePlan.from_depth(tree.depth, leaves).blocks(size)
    tokens = [list(range(a, a + n)) for a, n in zip(blocks.start, blocks.length, strict=True)]
    assert sorted(chain.from_iterable(tokens)) == list(range(tree.tree_tokens)) and max(map(len, tokens)) <= size
    for block, own in enumerate(tokens):
        above = blocks.parent[block]
        assert tree.parent[own[0]] == (tokens[above][-1] if above >= 0 else -1)
        assert all(tree.parent[token] == token - 1 for token in own[1:])
    assert [tokens[block][-1] for block in blocks.leaves] == leaves
    inner = {token for own in tokens for token in own[:-1]}
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=tree.tree_tokens)
    assert not any(children[token] > 1 for token in inner)
    level_of = {block: level for level, where in enumerate(blocks.levels) for block in range(len(blocks))[where]}
    assert len(level_of) == len(blocks)
    for block, level in level_of.items():
        assert level == (level_of[blocks.parent[block]] + 1 if blocks.parent[block] >= 0 else 0)


def test_rows_in_the_middle_of_sequences() -> None:
    plan = StatePlan.from_depth(np.array([7, 8, 7, 8, 8]))
    assert plan.parent.tolist() == [-1, 0, -1, 2, 2]
    assert plan.ancestors(2, torch.device("cpu"))[1].tolist() == [2, 1]


@pytest.mark.parametrize("size", [1, 64])
def test_many_roots(size: int) -> None:
    blocks = StatePlan.from_depth(np.zeros(1000, dtype=np.int64)).blocks(size)
    assert len(blocks) == 1000 and len(blocks.levels) == 1
