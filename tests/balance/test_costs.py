"""Costs that are read off prefix sums against trees that are built, token by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.balance.bound import lower_bound
from dta_plugin.balance.costs import TOKENS, TYPICAL, Run, SequenceCosts
from dta_plugin.tree.cost import ModelCost
from tests.support.dealing import CLOSE, WINDOWED, tree_cost
from tests.support.trees import BLOCK_FORKS, SHAPES, WIDE, Sequences, comb, sequence_batches, star

MODELS = {"typical": TYPICAL, "windows": WINDOWED, "tokens": TOKENS}


@st.composite
def disjoint_runs(draw: st.DrawFn, count: int) -> list[Run]:
    """Some of the stretches between random cuts, in any order."""
    cuts = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=6))})
    runs = [Run(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    return draw(st.permutations(runs))


def places(runs: list[Run]) -> np.ndarray:
    return np.array(sorted(place for run in runs for place in range(run.start, run.stop)), dtype=np.int64)


def members(costs: SequenceCosts, runs: list[Run]) -> list[int]:
    return [int(costs.order[place]) for run in runs for place in range(run.start, run.stop)]


@given(st.data(), sequence_batches(max_sequences=10), st.sampled_from(list(MODELS)))
def test_runs_cost_what_their_tree_costs(data: st.DataObject, sequences: Sequences, model: str) -> None:
    costs = SequenceCosts.from_sequences(sequences, MODELS[model])
    runs = data.draw(disjoint_runs(len(sequences)))
    chosen = [sequences[s] for s in members(costs, runs)]
    assert costs.of_places(places(runs)) == pytest.approx(tree_cost(chosen, MODELS[model]), rel=CLOSE, abs=0)
    assert costs.total == pytest.approx(tree_cost(sequences, MODELS[model]), rel=CLOSE)
    for run in runs:
        alone = [sequences[s] for s in members(costs, [run])]
        assert costs.of_run(run) == pytest.approx(tree_cost(alone, MODELS[model]), rel=CLOSE)


@given(st.data(), sequence_batches(max_sequences=10), st.integers(0, 14))
def test_scored_tokens_count_where_sequences_agree_on_them(
    data: st.DataObject, sequences: Sequences, begin: int
) -> None:
    """All completions begin at one position, as in a group."""
    costs = SequenceCosts.from_sequences(sequences, WINDOWED, [begin] * len(sequences))
    runs = data.draw(disjoint_runs(len(sequences)))
    chosen = members(costs, runs)
    expected = tree_cost([sequences[s] for s in chosen], WINDOWED, [begin] * len(chosen))
    assert costs.of_places(places(runs)) == pytest.approx(expected, rel=CLOSE, abs=0)


@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_scored_tokens_count_where_a_turn_is_the_next_ones_prompt(data: st.DataObject, turns: int, turn: int) -> None:
    sequences = comb(turns, turn)
    begins = [index * turn for index in range(turns)]
    costs = SequenceCosts.from_sequences(sequences, WINDOWED, begins)
    runs = data.draw(disjoint_runs(turns))
    chosen = members(costs, runs)
    expected = tree_cost([sequences[s] for s in chosen], WINDOWED, [begins[s] for s in chosen])
    assert costs.of_places(places(runs)) == pytest.approx(expected, rel=CLOSE, abs=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*SHAPES, *WIDE, *BLOCK_FORKS])
def test_every_shape(name: str, model: str) -> None:
    sequences = (SHAPES | WIDE | BLOCK_FORKS)[name]
    costs = SequenceCosts.from_sequences(sequences, MODELS[model])
    assert len(costs) == len(sequences)
    assert costs.total == pytest.approx(tree_cost(sequences, MODELS[model]), rel=CLOSE)
    odd = [Run(place, place + 1) for place in range(1, len(costs), 2)]
    chosen = [sequences[s] for s in members(costs, odd)]
    assert costs.of_places(places(odd)) == pytest.approx(tree_cost(chosen, MODELS[model]), rel=CLOSE, abs=0)


@given(st.data(), sequence_batches(max_sequences=12))
def test_overlap_is_what_all_between_share(data: st.DataObject, sequences: Sequences) -> None:
    costs = SequenceCosts.from_sequences(sequences, MODELS["tokens"])
    stop = data.draw(st.integers(1, len(sequences)))
    start = data.draw(st.integers(stop, len(sequences)))
    if start == len(sequences):
        return
    first, *others = (sequences[s] for s in costs.order[stop - 1 : start + 1].tolist())
    alike = (all(i < len(other) and other[i] == token for other in others) for i, token in enumerate(first))
    expected = next((i for i, same in enumerate(alike) if not same), len(first))
    assert costs.overlap(np.array([stop]), np.array([start])).tolist() == [expected]


@given(st.data(), sequence_batches(max_sequences=10))
def test_a_subset_costs_what_it_costs_by_itself(data: st.DataObject, sequences: Sequences) -> None:
    costs = SequenceCosts.from_sequences(sequences, WINDOWED)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(sequences) - 1), min_size=1)))
    subset = costs.subset(np.array(chosen))
    assert subset.total == pytest.approx(costs.of_places(np.array(chosen)), rel=CLOSE)
    assert subset.order.tolist() == costs.order[chosen].tolist()
    assert subset.of_places(np.arange(len(chosen))) == pytest.approx(subset.total, rel=CLOSE)


@given(sequence_batches(max_sequences=10), st.integers(1, 4))
def test_a_call_is_paid_once_per_bin(sequences: Sequences, bins: int) -> None:
    free, paid = (
        SequenceCosts.from_sequences(sequences, replace(TYPICAL, per_call=per_call)) for per_call in (0.0, 100.0)
    )
    everything = np.arange(len(sequences))
    assert paid.of_places(everything) == pytest.approx(free.of_places(everything) + 100.0)
    assert paid.of_run(Run(0, 1)) == pytest.approx(free.of_run(Run(0, 1)) + 100.0)
    assert paid.total == pytest.approx(free.total + 100.0)
    assert lower_bound(paid, bins) == pytest.approx(lower_bound(free, bins) + 100.0)
    assert paid.of_places(everything[:0]) == 0.0
    assert paid.without_fixed_cost().total == pytest.approx(free.without_fixed_cost().total)


@given(sequence_batches(max_sequences=10))
def test_trees_share_nothing_and_cover_all(sequences: Sequences) -> None:
    costs = SequenceCosts.from_sequences(sequences)
    assert sorted(members(costs, costs.trees)) == list(range(len(sequences)))
    first_tokens = [{sequences[s][0] for s in members(costs, [run])} for run in costs.trees]
    assert all(len(tokens) == 1 for tokens in first_tokens)
    assert len(set().union(*first_tokens)) == len(first_tokens)


@given(st.data(), sequence_batches(max_sequences=12), st.floats(0, 60))
def test_longest_within_keeps_the_budget_and_gives_up_a_quarter_at_most(
    data: st.DataObject, sequences: Sequences, budget: float
) -> None:
    costs = SequenceCosts.from_sequences(sequences)
    start = data.draw(st.integers(0, len(sequences) - 1))
    run = Run(start, data.draw(st.integers(start + 1, len(sequences))))
    part = costs.longest_within(run, budget)
    fitting = [stop for stop in range(start + 1, run.stop + 1) if costs.of_run(Run(start, stop)) <= budget]
    assert part.start == start and part.stop <= run.stop
    if not fitting:
        assert not len(part)
    else:
        assert part.stop in fitting
        assert len(part) >= 0.75 * (max(fitting) - start)


def test_a_whole_tree_within_the_budget_is_not_cut() -> None:
    costs = SequenceCosts.from_sequences(star(8))
    assert costs.longest_within(Run(0, 8), costs.total).stop == 8


def test_large_costs_lose_no_precision() -> None:
    """FLOPs of a large batch: a short run at its end is a small difference of large sums."""
    model = ModelCost(per_token=1.5e10, per_pair=1e6, per_scored=1e9)
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1000, size=500) for _ in range(2000)]
    costs = SequenceCosts.from_sequences(sequences, model)
    last = Run(len(costs) - 1, len(costs))
    assert costs.of_run(last) == pytest.approx(float(costs.path[-1]), rel=CLOSE)
