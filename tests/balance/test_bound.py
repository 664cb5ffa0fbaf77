"""The lower bound is one, and sees what the mean does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.balance import partition
from dta_plugin.balance.bound import lower_bound
from dta_plugin.balance.costs import TOKENS, TYPICAL, SequenceCosts
from dta_plugin.tree.cost import ModelCost
from tests.support.dealing import CLOSE, best_of_all, groups, tree_cost
from tests.support.trees import Sequences, run, sequence_batches, star


@given(sequence_batches(max_sequences=6), st.integers(1, 4))
def test_no_assignment_is_below(sequences: Sequences, bins: int) -> None:
    bound = lower_bound(SequenceCosts.from_sequences(sequences), bins)
    assert bound <= best_of_all(sequences, bins) * (1 + CLOSE)
    assert bound >= max(tree_cost(sequences) / bins, *(tree_cost([s]) for s in sequences), 0.0) * (1 - CLOSE)


@given(st.data(), sequence_batches(max_sequences=10), st.integers(1, 4))
def test_siblings_that_disagree_on_what_is_scored(data: st.DataObject, sequences: Sequences, bins: int) -> None:
    """What a set costs is at least what each of its sequences does, or the bound would be none."""
    cost = ModelCost(per_token=1.0, per_pair=0.1, per_scored=10.0)
    begins = [data.draw(st.integers(0, len(sequence))) for sequence in sequences]
    found = partition(sequences, bins, cost=cost, first_scored=begins, allow_empty=True)
    assert found.lower_bound <= max(found.loads) * (1 + CLOSE)
    everything = partition(sequences, 1, cost=cost, first_scored=begins).loads[0]
    assert everything >= tree_cost(sequences, cost, begins) * (1 - CLOSE)


@given(sequence_batches(max_sequences=12), st.integers(1, 6))
def test_more_bins_lower_it(sequences: Sequences, bins: int) -> None:
    costs = SequenceCosts.from_sequences(sequences, TYPICAL)
    assert lower_bound(costs, bins + 1) <= lower_bound(costs, bins) * (1 + CLOSE)


def test_without_sharing_it_is_the_mean_or_the_costliest() -> None:
    lengths = np.arange(1, 9)
    costs = SequenceCosts.from_sequences([[1200 + n, *run(n - 1)] for n in lengths.tolist()], TOKENS)
    assert lower_bound(costs, 3) == 36 / 3
    assert lower_bound(costs, 8) == 8


def test_what_all_share_is_in_every_bin() -> None:
    assert lower_bound(SequenceCosts.from_sequences(star(8, prefix=50, branch=2), TOKENS), 4) == 50 + 2 * 2


def test_a_group_too_large_for_a_bin_pays_its_prompt_several_times() -> None:
    """Two prompts of 100, 8 completions of 50 each: a bin of four, each with one prompt and four completions."""
    sequences = [[1200 + g, *sequence] for g in range(2) for sequence in star(8, prefix=99, branch=50)]
    bound = lower_bound(SequenceCosts.from_sequences(sequences, TOKENS), 4)
    assert bound == pytest.approx(100 + 4 * 50, rel=1e-3) and bound <= 300
    assert tree_cost(sequences, TOKENS) / 4 == 250
    assert max(partition(sequences, 4, cost=TOKENS).loads) == 300


@pytest.mark.parametrize("bins", [2, 8, 32])
def test_partitions_come_near(bins: int) -> None:
    sequences = groups(32, 8, longest=100)
    found = partition(sequences, bins)
    assert found.lower_bound == pytest.approx(lower_bound(SequenceCosts.from_sequences(sequences), bins))
    assert max(found.loads) <= 1.1 * found.lower_bound
