"""What bins cost by trees that are built, the best of all assignments, and batches of groups to deal out."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
from hypothesis import strategies as st

from dta_plugin import PrefixTree
from dta_plugin.balance import Partition
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.tree.cost import ModelCost
from tests.support.trees import Sequences, run

CLOSE = 1e-9
WINDOWED = ModelCost(10.0, 3.0, per_scored=50.0, per_window_pair=((3, 5.0), (8, 2.0)), per_call=90.0)


def tree_cost(sequences: Sequences, cost: ModelCost = TYPICAL, first_scored: list[int] | None = None) -> float:
    """What a call with the built tree costs; without sequences there is none.

    A token that any sequence scores is scored once; without first_scored nothing is.
    """
    if not sequences:
        return 0.0
    tree = PrefixTree.from_sequences(sequences)
    begins = first_scored or [len(sequence) for sequence in sequences]
    scored = {token for s, begin in enumerate(begins) for token in tree.path(s)[begin:].tolist()}
    return cost.per_call + cost.flops(tree.tree_tokens, tree.depth, len(scored))


def loads_are_true(found: Partition, sequences: Sequences, cost: ModelCost = TYPICAL) -> bool:
    true = [tree_cost([sequences[s] for s in members], cost) for members in found.bins]
    return bool(np.allclose(found.loads, true, rtol=CLOSE, atol=0))


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
