"""Forks against a brute-force walk over all prefixes, and the diagnoses that `find_forks` makes."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree import PrefixTree
from dta_plugin.tree.divergence import Fork, find_forks, first_fork_depth
from tests.support.trees import SHAPES, Sequences, comb, run, sequence_batches, star

Prefix = tuple[int, ...]


class Letters:
    """Token 97 is "a", and so on; tokens from 1000 on are pairs of letters: 1000 is "ab"."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join("ab" if token == 1000 else chr(token) for token in token_ids)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def forks_of(sequences: Sequences, **options: object) -> list[Fork]:
    return find_forks(PrefixTree.from_sequences(sequences), **options)  # type: ignore[arg-type]


def brute_force(sequences: Sequences, run_length: int) -> list[tuple[int, int, list[int], int, int]]:
    """Per fork: depth, sequences through, sizes of the branches, tokens apart and tokens repeated, sorted."""
    prefixes = {tuple(sequence[:n]) for sequence in sequences for n in range(len(sequence) + 1)}
    children: dict[Prefix, list[Prefix]] = defaultdict(list)
    for prefix in sorted(prefixes - {()}):
        children[prefix[:-1]].append(prefix)
    found = []
    for fork, starts in children.items():
        if len(starts) < 2:
            continue
        subtrees = [[prefix for prefix in prefixes if prefix[: len(start)] == start] for start in starts]
        subtrees.sort(key=len, reverse=True)
        through = sum(tuple(sequence[: len(fork)]) == fork for sequence in sequences)
        sizes = [len(subtree) for subtree in subtrees]
        found.append((len(fork), through, sizes, sum(sizes[1:]), repeated(subtrees, len(fork), run_length)))
    return sorted(found)


def repeated(subtrees: list[list[Prefix]], depth: int, length: int) -> int:
    seen: set[Prefix] = set()
    count = 0
    for subtree in subtrees:
        ends = [prefix for prefix in subtree if len(prefix) - length >= depth]
        inside = {end[: len(end) - back] for end in ends if end[-length:] in seen for back in range(length)}
        count += len(inside)
        seen |= {end[-length:] for end in ends}
    return count


def as_tuples(forks: list[Fork]) -> list[tuple[int, int, list[int], int, int]]:
    return sorted(
        (fork.depth, fork.sequences, [branch.tree_tokens for branch in fork.branches], fork.apart, fork.repeated)
        for fork in forks
    )


@pytest.mark.parametrize("name", SHAPES)
def test_forks_equal_brute_force(name: str) -> None:
    assert as_tuples(forks_of(SHAPES[name])) == brute_force(SHAPES[name], 16)


@given(sequence_batches(), st.sampled_from([2, 4]))
def test_repeated_tokens_equal_brute_force(sequences: Sequences, run_length: int) -> None:
    expected = brute_force(sequences, run_length)
    found = as_tuples(forks_of(sequences, run_length=run_length))
    assert [fork[:4] for fork in found] == [fork[:4] for fork in expected]
    # Branches of equal size have no order of their own, which can move a few repeated tokens.
    distinct = all(len(set(fork[2])) == len(fork[2]) for fork in expected)
    assert found == expected or not distinct


@given(sequence_batches(max_sequences=12, alphabet=2), st.integers(1, 4))
def test_limit_keeps_the_most_expensive(sequences: Sequences, limit: int) -> None:
    assert forks_of(sequences, limit=limit, run_length=2) == forks_of(sequences, run_length=2)[:limit]


@given(sequence_batches())
def test_every_sequence_leaves_a_fork_or_ends_there(sequences: Sequences) -> None:
    forks = forks_of(sequences)
    for fork in forks:
        assert fork.sequences == fork.ended + sum(branch.sequences for branch in fork.branches)
        assert 0 <= fork.repeated <= fork.apart
    assert first_fork_depth(PrefixTree.from_sequences(sequences)) == min((fork.depth for fork in forks), default=None)


def test_continuing_is_not_parting() -> None:
    assert forks_of(comb(6)) == []
    assert first_fork_depth(PrefixTree.from_sequences(comb(6))) is None


def test_roots_part_at_depth_zero() -> None:
    (fork,) = forks_of([[5, 6], [7]])
    assert (fork.depth, fork.sequences, fork.ended) == (0, 2, 0)


def test_openings_and_counts() -> None:
    (fork,) = forks_of([letters("the cat sat"), letters("the cat ran"), letters("the cat ran")], tokenizer=Letters())
    assert fork.context == "the cat "
    assert [(branch.text, branch.sequences, branch.flat_tokens) for branch in fork.branches] == [
        ("ran", 2, 6),
        ("sat", 1, 3),
    ]
    assert fork.branches[1].opening == tuple(letters("sat"))
    assert (fork.apart, fork.repeated, fork.cause) == (3, 0, None)


def test_a_timestamp_in_the_prompt() -> None:
    prompt = run(200, seed=1)
    sequences = [[*run(20), 3 + i, *prompt, *run(30, seed=10 + i)] for i in range(4)]
    fork = forks_of(sequences, limit=1)[0]
    assert (fork.depth, fork.repeated, fork.apart) == (20, 3 * 200, 3 * 231)
    assert fork.longest_repeat is not None
    assert (fork.longest_repeat.after, fork.longest_repeat.tokens) == (1, 200)
    assert fork.cause is not None and "a date, an id or a counter" in fork.cause


def test_an_expensive_fork_comes_before_a_large_one() -> None:
    unrelated = [[3, 3, *run(300, seed=1)], [3, 4, *run(300, seed=2)]]
    same_text = [[4, 4, *run(100, seed=3)], [4, 5, *run(100, seed=3)]]
    first = forks_of(unrelated + same_text)[0]
    assert (first.depth, first.sequences, first.repeated) == (1, 2, 100)


def test_stripped_thinking() -> None:
    turns = [letters("2+2? <think>easy</think>4"), letters("2+2? 4 and 3+3?")]
    (fork,) = forks_of(turns, tokenizer=Letters())
    assert fork.cause is not None and "<think>" in fork.cause


def test_retokenised_text() -> None:
    text = "ab and what follows it"
    fork = forks_of([[120, *letters(text)], [120, 1000, *letters(text[2:])]], tokenizer=Letters())[0]
    assert fork.cause is not None and "the same text in other tokens" in fork.cause


def test_different_answers_have_no_cause() -> None:
    assert all(fork.cause is None and fork.longest_repeat is None for fork in forks_of(star(20, 30, 40)))


@pytest.mark.parametrize("options", [{"run_length": 3}, {"run_length": 1}, {"limit": 0}])
def test_unusable_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="Expected"):
        forks_of(star(3), **options)
