"""Partitions against their definition: every sequence once, loads that are the costs of built trees, a lower bound that
is one, and for tiny batches a distance to the best of all assignments."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.balance import Partition, partition
from dta_plugin.balance.costs import TYPICAL, Run, SequenceCosts
from dta_plugin.tree.cost import ModelCost
from tests.support.trees import SHAPES, WIDE, Sequences, run, sequence_batches

WINDOWED = ModelCost(per_token=10.0, per_pair=3.0, per_scored=50.0, per_window_pair=((3, 5.0), (8, 2.0)))
CLOSE = 1e-9


def tree_cost(sequences: Sequences, model: ModelCost = TYPICAL) -> float:
    """What the built tree costs, nothing scored."""
    if not sequences:
        return 0.0
    tree = PrefixTree.from_sequences(sequences)
    return model.flops(tree.tree_tokens, tree.depth, 0)


def loads_are_true(found: Partition, sequences: Sequences, model: ModelCost = TYPICAL) -> bool:
    true = [tree_cost([sequences[s] for s in members], model) for members in found.bins]
    return bool(np.allclose(found.loads, true, rtol=CLOSE, atol=0))


def check(sequences: Sequences, bins: int, sizes: list[int] | None = None, model: ModelCost = TYPICAL) -> Partition:
    found = partition(sequences, bins, sizes=sizes, model=model)
    assert len(found.bins) == len(found.loads) == bins
    assert sorted(s for members in found.bins for s in members) == list(range(len(sequences)))
    if sizes is not None:
        assert list(map(len, found.bins)) == sizes
    assert loads_are_true(found, sequences, model)
    whole = tree_cost(sequences, model)
    assert found.lower_bound <= max(found.loads) * (1 + CLOSE)
    assert found.lower_bound >= max(whole / bins, *(tree_cost([s], model) for s in sequences), 0.0) * (1 - CLOSE)
    assert found.repeated == pytest.approx(sum(found.loads) - whole, abs=CLOSE * whole)
    assert found.imbalance == pytest.approx(max(found.loads) / np.mean(found.loads))
    for members in found.bins:  # siblings stand next to each other: in depth-first order
        tokens = [sequences[s] for s in members]
        assert tokens == sorted(tokens)
    return found


def best_of_all(sequences: Sequences, bins: int, sizes: list[int] | None = None) -> float:
    """The costliest bin of the best assignment there is."""
    count = len(sequences)
    cost = [tree_cost([s for i, s in enumerate(sequences) if chosen >> i & 1]) for chosen in range(1 << count)]
    best = float("inf")
    for assigned in product(range(bins), repeat=count):
        if sizes is None or [assigned.count(b) for b in range(bins)] == sizes:
            best = min(best, max(cost[sum(1 << i for i, a in enumerate(assigned) if a == b)] for b in range(bins)))
    return best


@st.composite
def counts(draw: st.DrawFn, total: int, bins: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=bins - 1, max_size=bins - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def groups(count: int, size: int, seed: int = 0, longest: int = 60, common: tuple[int, ...] = ()) -> Sequences:
    """Prompts of random lengths with completions of random lengths. common: what all prompts begin with."""
    generator = random.Random(seed)
    sequences = []
    for group in range(count):
        prompt = [*common, 1200 + group, *run(generator.randrange(longest), seed=group)]
        lengths = [1 + min(int(generator.expovariate(1 / 30)), 4 * longest) for _ in range(size)]
        sequences += [[*prompt, *run(length, seed=1000 + group * size + i)] for i, length in enumerate(lengths)]
    return sequences


@given(sequence_batches(max_sequences=14), st.integers(1, 16), st.sampled_from([TYPICAL, WINDOWED]))
def test_free_sizes(sequences: Sequences, bins: int, model: ModelCost) -> None:
    check(sequences, bins, model=model)


@given(st.data(), sequence_batches(max_sequences=14), st.integers(1, 8), st.sampled_from([TYPICAL, WINDOWED]))
def test_given_sizes(data: st.DataObject, sequences: Sequences, bins: int, model: ModelCost) -> None:
    check(sequences, bins, data.draw(counts(len(sequences), bins)), model)


@pytest.mark.parametrize("bins", [1, 2, 3, 8])
@pytest.mark.parametrize("name", [*SHAPES, *WIDE])
def test_every_shape(name: str, bins: int) -> None:
    sequences = (SHAPES | WIDE)[name]
    check(sequences, bins)
    share, rest = divmod(len(sequences), bins)
    check(sequences, bins, [share + (b < rest) for b in range(bins)])


@given(sequence_batches(max_sequences=6), st.integers(2, 3))
def test_nothing_is_below_the_lower_bound_and_free_sizes_are_near_the_best(sequences: Sequences, bins: int) -> None:
    best = best_of_all(sequences, bins)
    found = check(sequences, bins)
    assert found.lower_bound <= best * (1 + CLOSE)
    # Of 4,000 random batches like these 98 % were the best, 99.8 % within 1.2 of it; the worst was at 1.33.
    assert best * (1 - CLOSE) <= max(found.loads) <= 1.34 * best


@given(st.data(), sequence_batches(max_sequences=6), st.integers(2, 3))
def test_given_sizes_are_within_a_factor_of_the_best(data: st.DataObject, sequences: Sequences, bins: int) -> None:
    sizes = data.draw(counts(len(sequences), bins))
    best = best_of_all(sequences, bins, sizes)
    found = check(sequences, bins, sizes)
    assert found.lower_bound <= best * (1 + CLOSE)
    # Of 4,000 random batches with equal counts 94 % were the best, 98 % within 1.2 of it; the worst was at 1.73. With
    # unequal counts a tree may be cut in the wrong place: [3], [3] and [4] in bins of 2 and 1 cost twice the best.
    assert best * (1 - CLOSE) <= max(found.loads) <= 2.01 * best


@given(sequence_batches(max_sequences=12), st.integers(1, 5))
def test_the_same_batch_gives_the_same_partition(sequences: Sequences, bins: int) -> None:
    assert partition(sequences, bins).bins == partition(sequences, bins).bins
    copies = [np.array(sequence) for sequence in sequences]
    assert partition(copies, bins).bins == partition(sequences, bins).bins


def test_whole_groups_stay_whole_where_counts_divide() -> None:
    sequences = groups(64, 8)
    found = check(sequences, 8, [64] * 8)
    assert found.repeated == pytest.approx(0.0, abs=1e-6)
    assert found.imbalance <= 1.02
    assert [len({s // 8 for s in members}) for members in found.bins] == [8] * 8


@pytest.mark.parametrize("bins", [2, 4, 8, 16])
def test_many_groups_per_bin_balance(bins: int) -> None:
    found = check(groups(64, 8), bins)
    assert max(found.loads) <= 1.05 * found.lower_bound


def test_duplicates_cost_once_in_a_bin() -> None:
    sequences = [run(20)] * 6 + [run(20, seed=1)] * 6
    for sizes in (None, [6, 6]):
        found = check(sequences, 2, sizes)
        assert sorted(map(sorted, found.bins)) == [list(range(6)), list(range(6, 12))]
        assert found.repeated == pytest.approx(0.0, abs=1e-9)
    assert check([run(20)] * 8, 4, [2] * 4).repeated == pytest.approx(3 * tree_cost([run(20)]))


def test_more_bins_than_sequences_leaves_bins_empty() -> None:
    for sizes in (None, [1, 0, 1, 0, 1]):
        found = check([[1, 2], [3, 4], [5, 6]], 5, sizes)
        assert sorted(map(len, found.bins)) == [0, 0, 1, 1, 1]
        assert sorted(found.loads)[:2] == [0.0, 0.0]
        assert "3 sequences in 5 bins" in str(found)


@pytest.mark.parametrize("sequences", [[run(10), [1200], [1201], [1202]], [run(20)] * 8])
def test_bins_stay_empty_where_using_them_would_lower_nothing(sequences: Sequences) -> None:
    found = check(sequences, 4)
    assert [] in found.bins
    assert max(found.loads) == pytest.approx(found.lower_bound)


def test_whole_groups_stay_whole_behind_a_common_first_token() -> None:
    sequences = groups(64, 8, common=(5,))
    found = check(sequences, 8, [64] * 8)
    assert found.repeated == pytest.approx(7 * tree_cost([[5]]))
    assert found.imbalance <= 1.02
    free = check(sequences, 8)
    assert max(free.loads) <= 1.02 * free.lower_bound


def test_scored_tokens_count() -> None:
    """Prompts and completions of one length; only the LM head tells them apart."""
    model = ModelCost(per_token=1.0, per_pair=0.0, per_scored=10.0)
    sequences = [[1200 + i, *run(9, seed=i)] for i in range(4)]
    found = partition(sequences, 2, model=model, first_scored=[1, 10, 10, 10])
    assert sorted(map(sorted, found.bins)) == [[0], [1, 2, 3]]
    assert sorted(found.loads) == [30.0, 100.0]


def test_two_thousand_sequences_in_sixty_four_bins() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(32768, size=(2048, 300))
    for first in range(0, len(rows), 8):
        rows[first : first + 8, :75] = rows[first, :75]
    found = partition(list(rows), 64)
    assert sorted(s for members in found.bins for s in members) == list(range(2048))
    assert max(found.loads) <= 1.05 * found.lower_bound


def test_the_check_of_loads_notices_that_siblings_were_ignored() -> None:
    """Sums of what the sequences cost one by one, and loads of other bins, are no loads of these bins."""
    sequences = groups(6, 4)
    found = partition(sequences, 3)
    assert loads_are_true(found, sequences)
    flat = [sum(tree_cost([sequences[s]]) for s in members) for members in found.bins]
    assert not loads_are_true(Partition(found.bins, flat, found.lower_bound, 0.0), sequences)
    dealt = [list(range(start, len(sequences), 3)) for start in range(3)]  # siblings apart
    assert not loads_are_true(Partition(dealt, found.loads, found.lower_bound, 0.0), sequences)
    costs = SequenceCosts.of(sequences)
    rank = np.argsort(costs.order)
    true = [costs.of_runs([Run(int(rank[s]), int(rank[s]) + 1) for s in members]) for members in dealt]
    assert loads_are_true(Partition(dealt, true, found.lower_bound, 0.0), sequences)


def test_errors() -> None:
    with pytest.raises(InvalidInputError, match=r"bins=0. Expected at least 1"):
        partition([[1]], 0)
    for sizes in ([1, 2], [2], [3, -1], [1, 1, 0]):
        with pytest.raises(InvalidInputError, match=r"2 bins. Expected 2 counts, none negative, that add up to 2"):
            partition([[1], [2]], 2, sizes=sizes)
    with pytest.raises(InvalidInputError, match="Sequence 0 has shape"):
        partition([np.array([0.5])], 1)


@pytest.mark.parametrize(
    ("sequences", "first_scored", "message"),
    [
        ([], None, "Got no sequences"),
        ([[1, 2], [3, 4]], [1], "Got 1 entries of first_scored for 2 sequences"),
        ([[1, 2], [3, 4]], [1, 1, 1], "Got 3 entries of first_scored for 2 sequences"),
    ],
)
def test_errors_that_name_the_argument(sequences: Sequences, first_scored: list[int] | None, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        partition(sequences, 2, first_scored=first_scored)
