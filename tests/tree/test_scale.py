"""Ways through large trees and through many short sequences: the same results as the plain ones, in linear steps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dta_plugin import PrefixTree
from dta_plugin.execution.streaming import chunking
from dta_plugin.tree import fingerprints, trie
from dta_plugin.tree.divergence import find_forks
from dta_plugin.tree.fingerprints import Fingerprints, repeated_ids
from tests.support.trees import SHAPES, Sequences, sequence_batches, star

_PATCHES_ARE_FINE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays_of(sequences: Sequences, as_short: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    with monkeypatch.context() as patch:
        patch.setattr(trie, "_are_short", lambda rows: as_short)
        tree = PrefixTree.from_sequences(sequences)
    return {name: np.asarray(getattr(tree, name)).tolist() for name in PrefixTree.__slots__}


@pytest.mark.parametrize("name", SHAPES)
def test_short_sequences_give_the_same_tree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [arrays_of(SHAPES[name], as_short, monkeypatch) for as_short in (False, True)]
    assert ways[0] == ways[1]


@_PATCHES_ARE_FINE
@given(sequences=sequence_batches(max_sequences=14))
def test_short_random_sequences_give_the_same_tree(sequences: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrays_of(sequences, True, monkeypatch) == arrays_of(sequences, False, monkeypatch)


def test_many_short_sequences_go_position_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python steps: one per position, not one per sequence."""
    calls = []
    fill = trie._by_position
    monkeypatch.setattr(trie, "_by_position", lambda *arguments: (calls.append(1), fill(*arguments))[1])
    monkeypatch.setattr(trie, "_by_sequence", None)
    monkeypatch.setattr(trie, "_as_token_array", None)
    rows = np.random.default_rng(0).integers(0, 9, (3000, 4)).tolist()
    tree = PrefixTree.from_sequences(rows)
    assert calls == [1] and tree.tree_tokens == len({tuple(r[: n + 1]) for r in rows for n in range(4)})


@pytest.mark.parametrize(
    ("bad", "message"),
    [([1.0], "dtype float64"), ([True], "dtype bool"), ([-1], "from -1 to -1"), ([], "is empty"), ([2**70], "object")],
)
def test_a_bad_row_among_many_short_ones_is_named(bad: list[object], message: str) -> None:
    rows: list[object] = [[1, 2]] * 2000
    rows[1234] = bad
    with pytest.raises(trie.InvalidInputError, match=f"Sequence 1234 .*{message}"):
        PrefixTree.from_sequences(rows)  # type: ignore[arg-type]


def hash_of(run: list[int]) -> int:
    """The polynomial of a run of tokens, the last one first."""
    hashes = [((token + 1) * 0xD6E8FEB86659FD93) % 2**64 for token in reversed(run)]
    return sum((x ^ x >> 32) * fingerprints._BASE**place for place, x in enumerate(hashes)) % 2**64


@_PATCHES_ARE_FINE
@given(sequences=sequence_batches(max_length=40), length=st.sampled_from([2, 4, 16]), block=st.sampled_from([3, 64]))
def test_fingerprints_whatever_the_block(
    sequences: Sequences, length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = PrefixTree.from_sequences(sequences)
    forks = find_forks(tree, run_length=length)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_BLOCK", block)
        found = Fingerprints.from_tree(tree, length)
        assert find_forks(tree, run_length=length) == forks
        repeated = repeated_ids(found.ids, tree.depth, length - 1)
    runs: dict[int, tuple[int, ...]] = {}  # of every token of the tree, the run of its path that ends there
    for sequence, tokens in enumerate(sequences):
        for place, token in enumerate(tree.path(sequence).tolist()):
            runs[token] = tuple(tokens[max(0, place + 1 - length) : place + 1])
    assert found.ids.tolist() == [hash_of(list(runs[token])) for token in range(tree.tree_tokens)]
    times = Counter(run for run in runs.values() if len(run) == length)
    assert repeated.tolist() == [token for token in range(tree.tree_tokens) if times[runs[token]] > 1]


def test_placing_many_roots_takes_a_step_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied while groups grow: nothing."""
    lists: list[list[int]] = []
    replace = chunking.heapq.heapreplace
    monkeypatch.setattr(
        chunking.heapq, "heapreplace", lambda heap, item: (lists.append(item[2]), replace(heap, item))[1]
    )
    plan = chunking.plan_chunks(PrefixTree.from_sequences(star(500, prefix=1)), budget=100)
    assert len(plan.chunks) > 5
    assert len({id(group) for group in lists}) <= len(plan.chunks)
