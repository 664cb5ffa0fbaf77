"""SiblingSampler: every index once, siblings together, ranks with equal work, any epoch again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.balance import SiblingSampler
from tests.support.trees import Sequences, forest, run, sequence_batches, star

SIZES = st.integers(1, 9)


def batches_of(sampler: SiblingSampler) -> list[list[int]]:
    indices = list(sampler)
    return [indices[i : i + sampler.batch_size] for i in range(0, len(indices), sampler.batch_size)]


def tree_tokens(sequences: Sequences, batches: list[list[int]]) -> int:
    return sum(PrefixTree.from_sequences([sequences[i] for i in batch]).tree_tokens for batch in batches)


def groups(count: int, size: int, prompt: int = 30, system: int = 0) -> Sequences:
    """`count` prompts with `size` completions each, shuffled."""
    rows = [
        run(system, seed=1) + run(prompt, seed=10 + group) + run(5 + i, seed=1000 * group + i)
        for group in range(count)
        for i in range(size)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


@settings(max_examples=150)
@given(sequence_batches(14), SIZES, st.integers(1, 4), st.booleans(), st.integers(0, 3), st.sampled_from([0, 0.1, 1]))
def test_every_index_once(
    sequences: Sequences, batch_size: int, world_size: int, shuffle: bool, epoch: int, least_shared: float
) -> None:
    options = {"world_size": world_size, "shuffle": shuffle, "least_shared": least_shared}
    sampler = SiblingSampler(sequences, batch_size, **options)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert sorted(indices) == list(range(len(sequences))) and len(sampler) == len(indices)
    again = SiblingSampler(sequences, batch_size, **options)
    again.set_epoch(epoch)
    assert list(again) == indices == list(sampler)
    full = [sum(map(len, batch)) for batch in sampler.batches()][:-1]
    assert full == [batch_size] * ((len(sequences) - 1) // batch_size)
    whole = SiblingSampler(sequences, batch_size, **options, drop_last=True)
    kept = list(whole)
    assert len(kept) == len(set(kept)) == len(whole) == len(sequences) // batch_size * batch_size


@pytest.mark.parametrize("system", [0, 40])
def test_siblings_share_a_batch(system: int) -> None:
    """Families that fill batches stay whole, with a prompt that all have in common, too."""
    sequences = groups(12, 4, system=system)
    for size, count in ((4, 12), (8, 6)):
        sampler = SiblingSampler(sequences, size)
        least = PrefixTree.from_sequences(sequences).tree_tokens + (count - 1) * system
        assert tree_tokens(sequences, batches_of(sampler)) == least
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(0)).view(-1, 4).tolist()
    assert tree_tokens(sequences, shuffled) > 1.5 * tree_tokens(sequences, batches_of(SiblingSampler(sequences, 4)))


def test_families_of_odd_sizes_are_rarely_cut() -> None:
    sequences = groups(20, 3) + groups(7, 5, prompt=29)
    sampler = SiblingSampler(sequences, 8)
    least = PrefixTree.from_sequences(sequences).tree_tokens
    assert tree_tokens(sequences, batches_of(sampler)) < 1.1 * least


def test_a_family_larger_than_a_batch_is_cut_where_little_is_shared() -> None:
    cousins = [[*run(5), 1050, *run(4, seed=7), last] for last in (3, 4, 5)]
    sequences = [*star(3, prefix=9), *cousins, [8, 9], [9, 8]]
    families = {frozenset(batch) & set(range(6)) for batch in batches_of(SiblingSampler(sequences, 4))}
    assert families == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}


def test_epochs_differ_and_seeds_do() -> None:
    sequences = groups(10, 3)
    sampler = SiblingSampler(sequences, 4)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(SiblingSampler(sequences, 4, seed=1)) != first
    fixed = SiblingSampler(sequences, 4, shuffle=False)
    before = list(fixed)
    fixed.set_epoch(5)
    assert list(fixed) == before


def test_ranks_work_alike() -> None:
    """Batches of one turn cost alike, although batches of an epoch do not."""
    sequences = [run(10 + 5 * i, seed=i) for i in range(64)]
    batches = batches_of(SiblingSampler(sequences, 2, world_size=4))
    loads = np.array([sum(len(sequences[i]) for i in batch) for batch in batches]).reshape(-1, 4)
    assert (loads.max(axis=1) / loads.mean(axis=1)).mean() < 1.1
    assert loads.mean(axis=1).max() > 1.5 * loads.mean(axis=1).min()
    apart = np.array([sum(len(sequences[i]) for i in batch) for batch in batches_of(SiblingSampler(sequences, 2))])
    assert (apart.reshape(-1, 4).max(axis=1) / apart.reshape(-1, 4).mean(axis=1)).mean() > 1.2, "the control"


def test_in_a_data_loader() -> None:
    sequences = forest()
    sampler = SiblingSampler(sequences, 3)
    loaded = [batch.tolist() for batch in DataLoader(range(len(sequences)), batch_size=3, sampler=sampler)]
    assert loaded == batches_of(sampler)


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="Got 0 sequences, batch_size=4"):
        SiblingSampler([], 4)
    with pytest.raises(InvalidInputError, match="batch_size=0"):
        SiblingSampler([[1]], 0)
    with pytest.raises(InvalidInputError, match="least_shared=2"):
        SiblingSampler([[1]], 1, least_shared=2)


def test_no_example_is_left_out_for_good() -> None:
    rows = [np.random.default_rng(i).integers(1000, size=5 + 8 * i) for i in range(23)]
    sampler = SiblingSampler(rows, 1, world_size=4)
    seen: set[int] = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for rank in range(4):
            seen.update(i for b in BatchSamplerShard(BatchSampler(sampler, 1, True), 4, rank) for i in b)
    assert seen == set(range(23))
