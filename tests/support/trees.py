"""Batches of token sequences: the shapes that every suite must cover, and hypothesis strategies for random trees."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dta_plugin.attention.cpu_plan import _BLOCK, _UNIT

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FIRST_TOKEN = 3  # below are padding, start and end of sequence
VOCABULARY = 1100  # enough for a fork with 1,000 different children

Sequences = list[list[int]]


def run(length: int, seed: int = 0) -> list[int]:
    """`length` random tokens; runs with different seeds part at once or soon."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)]


def star(fan_out: int, prefix: int = 5, branch: int = 2) -> Sequences:
    """One prompt, `fan_out` different continuations that part at their first token."""
    return [[*run(prefix), FIRST_TOKEN + i, *run(branch - 1, seed=i + 1)] for i in range(fan_out)]


def comb(turns: int, turn: int = 3) -> Sequences:
    """A conversation of which every turn is a sequence; all but the last end inside the tree."""
    return [run((i + 1) * turn) for i in range(turns)]


def branching_comb(turns: int, turn: int = 3) -> Sequences:
    """A conversation with, at every turn, one more answer that leads nowhere."""
    return comb(turns, turn) + [run((i + 1) * turn) + run(2, seed=100 + i) for i in range(turns)]


def fork_at(offset: int, tail: int = 3) -> Sequences:
    """Two continuations that part after `offset` common tokens."""
    return [[*run(offset), token, *run(tail - 1, seed=token)] for token in (FIRST_TOKEN, FIRST_TOKEN + 1)]


def binary(levels: int, node: int = 2) -> Sequences:
    """A full binary tree with nodes of `node` tokens."""
    paths: Sequences = [[]]
    for level in range(levels):
        paths = [[*path, FIRST_TOKEN + bit, *run(node - 1, seed=level)] for path in paths for bit in (0, 1)]
    return paths


def forest() -> Sequences:
    """Several trees in one row: a star, a comb, and a sequence that shares nothing."""
    return star(3) + [[7, *sequence] for sequence in comb(3)] + [[8, 9, 10, 11]]


SHAPES: dict[str, Sequences] = {
    "single_token": [[5]],
    "single_sequence": [run(9)],
    "star_1": star(1),
    "star_2": star(2),
    "star_33": star(33, prefix=11, branch=3),
    "deep_chain": [run(300), run(300)[:299]],
    "comb": comb(6),
    "branching_comb": branching_comb(5),
    "binary": binary(4),
    "duplicates": [run(6), run(6), run(6), [*run(4), 7], [*run(4), 7]],
    "prefix_of_another": [run(12), run(5), run(1)],
    "one_token_branches": star(9, prefix=4, branch=1),
    "one_token_trees": [[token] for token in range(3, 12)],
    "nothing_shared": [[token, *run(4, seed=token)] for token in range(3, 7)],
    "forest": forest(),
}

WIDE: dict[str, Sequences] = {"star_1000": star(1000), "star_1000_one_token": star(1000, prefix=70, branch=1)}


def block_forks() -> Iterator[tuple[str, Sequences]]:
    """Forks around the boundaries of the CPU path's units and blocks: before, at and after each."""
    for size in (_UNIT, _BLOCK, 2 * _BLOCK):
        for offset in (size - 1, size, size + 1):
            yield f"fork_{offset}", fork_at(offset)
            yield f"fork_{offset}_long", fork_at(offset, tail=size + 1)


BLOCK_FORKS: dict[str, Sequences] = dict(block_forks())


def sequence_batches(
    max_sequences: int = 8, max_length: int = 12, alphabet: int = 3, min_length: int = 1
) -> SearchStrategy[Sequences]:
    """Batches in which a sequence continues, ends inside, repeats or ignores an earlier one."""
    from hypothesis import strategies as st  # here: tests on a GPU need the shapes above, and may lack it

    tokens = st.integers(FIRST_TOKEN, FIRST_TOKEN + alphabet - 1)

    @st.composite
    def batches(draw: st.DrawFn) -> Sequences:
        batch: Sequences = []
        for _ in range(draw(st.integers(1, max_sequences))):
            base = draw(st.sampled_from([[], *batch]))
            kept = base[: draw(st.integers(0, len(base)))]
            fewest = max(0, min_length - len(kept))
            batch.append(kept + draw(st.lists(tokens, min_size=fewest, max_size=max(fewest, max_length - len(kept)))))
        return draw(st.permutations(batch))

    return batches()
