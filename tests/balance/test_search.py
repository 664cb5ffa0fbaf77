"""What the search believes a bin would cost, against what it would cost; and what starts and search may not do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.balance.costs import TYPICAL, SequenceCosts, subtrees
from dta_plugin.balance.search import Bin, local_search
from dta_plugin.balance.starts import Assignment, free_starts, packed, places_of, sized_starts, without_empty
from tests.support.dealing import CLOSE, counts, groups
from tests.support.trees import Sequences, sequence_batches


@st.composite
def two_bins(draw: st.DrawFn) -> tuple[SequenceCosts, Bin, Bin]:
    costs = SequenceCosts.from_sequences(draw(sequence_batches(max_sequences=12)), TYPICAL)
    first = np.array(draw(st.lists(st.booleans(), min_size=len(costs), max_size=len(costs))), dtype=bool)
    return costs, Bin(costs, np.flatnonzero(first)), Bin(costs, np.flatnonzero(~first))


def costliest(costs: SequenceCosts, bins: Assignment) -> float:
    return max(map(costs.of_places, bins))


@given(two_bins())
def test_what_a_bin_saves_and_another_adds(drawn: tuple[SequenceCosts, Bin, Bin]) -> None:
    costs, here, there = drawn
    scale = CLOSE * costs.total
    added = here.added_to(there)
    for index in range(len(here.saved)):
        gift, kept = here.parted(index)
        assert here.alone[index] == pytest.approx(costs.of_places(gift), abs=scale)
        assert here.saved[index] == pytest.approx(here.load - costs.of_places(kept), abs=scale)
        true = costs.of_places(np.sort(np.concatenate([there.places, gift]))) - there.load
        assert added[index] >= true - scale
        if not np.any((there.places > gift[0]) & (there.places < gift[-1])):
            assert added[index] == pytest.approx(true, abs=scale)


@given(two_bins())
def test_subtrees_are_the_nodes_of_the_tree(drawn: tuple[SequenceCosts, Bin, Bin]) -> None:
    costs, _, _ = drawn
    shared = costs.shared.tolist()
    expected = {(start, start + 1) for start in range(len(costs))}
    for start in range(len(costs)):
        for stop in range(start + 2, len(costs) + 1):
            around = max(shared[start] if start else -1.0, shared[stop] if stop < len(costs) else -1.0)
            if min(shared[start + 1 : stop]) > around:
                expected.add((start, stop))
    assert subtrees(shared[1:], len(costs)) == expected


@given(st.data(), sequence_batches(max_sequences=14), st.integers(1, 6))
def test_starts_and_search_keep_their_promises(data: st.DataObject, sequences: Sequences, bins: int) -> None:
    costs = SequenceCosts.from_sequences(sequences).without_fixed_cost()
    everything = list(range(len(costs)))
    sizes = data.draw(counts(len(costs), bins))
    free, sized = free_starts(costs, bins), sized_starts(costs, sizes)
    if len(costs) >= bins:
        free = [without_empty(costs, filled) for filled in free]
        assert all(len(places) for filled in free for places in filled)
    for starts, swaps_only in ((free, False), (sized, True)):
        for filled in (*starts, local_search(costs, starts, swaps_only)):
            assert len(filled) == bins and np.sort(np.concatenate(filled)).tolist() == everything
            assert all((np.diff(places) > 0).all() for places in filled)
            if swaps_only:
                assert list(map(len, filled)) == sizes
            elif len(costs) >= bins:
                assert all(map(len, filled))
        best = min(costliest(costs, start) for start in starts)
        assert costliest(costs, filled) <= best * (1 + CLOSE)


@given(sequence_batches(max_sequences=14), st.integers(1, 6), st.floats(1.0, 60.0))
def test_packed_keeps_the_capacity(sequences: Sequences, bins: int, capacity: float) -> None:
    costs = SequenceCosts.from_sequences(sequences)
    found = packed(costs, bins, capacity)
    if found is not None:
        assert costliest(costs, places_of(found)) <= capacity * (1 + CLOSE)
    else:
        assert costs.total > capacity


@given(sequence_batches(max_sequences=14), st.data())
def test_empty_bins_are_filled_where_that_repeats_least(sequences: Sequences, data: st.DataObject) -> None:
    costs = SequenceCosts.from_sequences(sequences)
    bins = data.draw(st.integers(1, len(costs)))
    everything, none = np.arange(len(costs)), np.empty(0, dtype=np.int64)
    filled = without_empty(costs, [everything, *[none] * (bins - 1)])
    least = np.sort(costs.shared[1:])[: bins - 1].sum()
    assert sum(map(costs.of_places, filled)) - costs.total == pytest.approx(least, abs=CLOSE * costs.total)


def test_search_pays() -> None:
    """Negative control of the search: the starts alone are worse."""
    costs = SequenceCosts.from_sequences(groups(20, 8, seed=3)).without_fixed_cost()
    starts = free_starts(costs, 16)
    assert costliest(costs, local_search(costs, starts, False)) < min(costliest(costs, start) for start in starts)
