"""PrefixTree against the definition: the set of all prefixes, sorted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given

from dta_plugin import InvalidInputError, PrefixTree
from tests.support.trees import BLOCK_FORKS, SHAPES, WIDE, Sequences, comb, run, sequence_batches

Prefix = tuple[int, ...]


def all_prefixes(sequences: Sequences) -> list[Prefix]:
    """Every token of the tree as the path that leads to it; sorted, which is depth-first preorder."""
    return sorted({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})


def check_against_definition(sequences: Sequences) -> None:
    tree = PrefixTree.from_sequences(sequences)
    prefixes = all_prefixes(sequences)
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    children = Counter(prefix[:-1] for prefix in prefixes)
    passing = Counter(tuple(s[: i + 1]) for s in sequences for i in range(len(s)))
    subtree = Counter(prefix[: i + 1] for prefix in prefixes for i in range(len(prefix)))

    assert tree.tokens.tolist() == [prefix[-1] for prefix in prefixes]
    assert tree.depth.tolist() == [len(prefix) - 1 for prefix in prefixes]
    assert tree.parent.tolist() == [index.get(prefix[:-1], -1) for prefix in prefixes]
    assert tree.exit.tolist() == [index[prefix] + subtree[prefix] for prefix in prefixes]
    assert tree.multiplicity.tolist() == [passing[prefix] for prefix in prefixes]
    starts = [i for i, p in enumerate(prefixes) if len(p) == 1 or children[p[:-1]] > 1]
    assert tree.node_start.tolist() == [*starts, len(prefixes)]
    for s, sequence in enumerate(sequences):
        assert tree.path(s).tolist() == [index[tuple(sequence[: i + 1])] for i in range(len(sequence))]
    assert [sequences[s] for s in tree.order] == sorted(sequences)

    lengths = [len(s) for s in sequences]
    assert (tree.num_sequences, tree.num_nodes) == (len(sequences), len(starts))
    assert (tree.flat_tokens, tree.tree_tokens) == (sum(lengths), len(prefixes))
    assert tree.compression_ratio == sum(lengths) / len(prefixes)
    assert tree.visible_pairs() == sum(len(prefix) for prefix in prefixes)
    assert tree.flat_visible_pairs() == sum(i + 1 for length in lengths for i in range(length))


@pytest.mark.parametrize("name", [*SHAPES, "star_1000"])
def test_shapes(name: str) -> None:
    check_against_definition((SHAPES | WIDE)[name])


@pytest.mark.parametrize("name", BLOCK_FORKS)
def test_long_forks(name: str) -> None:
    sequences = BLOCK_FORKS[name]
    tree = PrefixTree.from_sequences(sequences)
    shared = int(name.split("_")[1])
    assert tree.tree_tokens == sum(len(s) for s in sequences) - shared
    assert tree.node_start.tolist() == [0, shared, len(sequences[0]), tree.tree_tokens]


@given(sequence_batches())
def test_random_batches(sequences: Sequences) -> None:
    check_against_definition(sequences)


@given(sequence_batches(max_sequences=14, max_length=5, alphabet=2))
def test_random_bushy_batches(sequences: Sequences) -> None:
    check_against_definition(sequences)


@given(sequence_batches())
def test_descendants_are_one_interval(sequences: Sequences) -> None:
    """The fact the attention op rests on: j is an ancestor of i or i itself exactly if j <= i < exit[j]."""
    tree = PrefixTree.from_sequences(sequences)
    for i in range(tree.tree_tokens):
        ancestors = set()
        t = i
        while t >= 0:
            ancestors.add(t)
            t = int(tree.parent[t])
        assert ancestors == {j for j in range(tree.tree_tokens) if j <= i < tree.exit[j]}


@pytest.mark.parametrize(
    "convert",
    [torch.tensor, np.array, lambda s: np.array(s, np.uint32), tuple],
    ids=["torch", "numpy", "numpy_uint32", "tuple"],
)
def test_input_types_agree(convert: Callable[[list[int]], object]) -> None:
    sequences = SHAPES["forest"]
    expected = PrefixTree.from_sequences(sequences)
    actual = PrefixTree.from_sequences([convert(s) for s in sequences])  # type: ignore[misc]
    assert actual.tokens.tolist() == expected.tokens.tolist()
    assert actual.paths.tolist() == expected.paths.tolist()


def test_largest_token_ids_sort_as_numbers() -> None:
    check_against_definition([[2**32 - 1, 1], [255, 256], [256, 255], [2**31, 0], [1]])


@pytest.mark.parametrize("shape", ["star", "comb", "duplicates"])
def test_1024_sequences_of_4096_tokens(shape: str) -> None:
    rows = np.random.default_rng(0).integers(3, 100_000, (1024, 4096))
    if shape == "star":
        rows[:, :1000] = rows[0, :1000]
        rows[:, 1000] = np.arange(1024)
        sequences, expected = list(rows), 1000 + 1024 * 3096
    elif shape == "comb":
        sequences, expected = [rows[0, : 4 * (i + 1)] for i in range(1024)], 4096
    else:
        sequences, expected = [rows[i % 2] for i in range(1024)], 2 * 4096
    tree = PrefixTree.from_sequences(sequences)
    assert tree.tree_tokens == expected
    for s in (0, 511, 1023):
        assert np.array_equal(tree.tokens[tree.path(s)], sequences[s])


INVALID: dict[str, tuple[list[object], str]] = {
    "empty batch": ([], r"empty batch: 0 sequences.*at least one.*skip the call"),
    "empty sequence": ([[5], []], r"Sequence 1 is empty.*at least one token.*drop empty rollouts"),
    "2-D": ([[[1, 2], [3, 4]]], r"Sequence 0 has shape \(2, 2\).*1-D row.*pass one unpadded sequence"),
    "nested": ([[[1, 2], [3]]], r"Sequence 0 is a list that is no row of integers.*pass one unpadded sequence"),
    "bfloat16": ([torch.ones(2, dtype=torch.bfloat16)], r"Sequence 0 is a Tensor that is no row of integers"),
    "scalar": ([7], r"Sequence 0 has shape \(\).*1-D row"),
    "float list": ([[1.0, 2.0]], r"dtype float64.*integer token ids"),
    "float tensor": ([torch.ones(3)], r"dtype float32.*integer token ids"),
    "bool": ([[True, False]], r"dtype bool.*integer token ids"),
    "text": (["ab"], r"dtype <U2.*integer token ids"),
    "negative": ([[1], [4, -100]], r"Sequence 1 has token ids from -100 to 4.*\[0, 4294967295\].*-100"),
    "too large": ([[2**32]], r"token ids from 4294967296.*\[0, 4294967295\]"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input(case: str) -> None:
    sequences, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        PrefixTree.from_sequences(sequences)  # type: ignore[arg-type]


def test_a_generator_of_sequences_is_read_once() -> None:
    tree = PrefixTree.from_sequences(run(i + 1) for i in range(4))
    assert (tree.num_sequences, tree.tree_tokens) == (4, len(comb(4, turn=1)[-1]))
