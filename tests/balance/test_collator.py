"""SequenceBalancingCollator and the token ids of examples: same examples, another order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.balance import SequenceBalancingCollator
from dta_plugin.balance.examples import token_columns, token_path
from tests.support.trees import Sequences, run, sequence_batches

PATHS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "sequence": ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, [1, 2, 3]),
    "tensor": ({"input_ids": torch.tensor([1, 2, 3])}, [1, 2, 3]),
    "completion": ({"prompt_ids": [1, 2], "completion_ids": [3], "label": True}, [1, 2, 3]),
    "preference": ({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5, 6]}, [1, 2, 3, 4, 5, 6]),
    "reward": ({"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2], "margin": 0.5}, [1, 2, 3]),
    "older names": ({"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]}, [1, 2, 3]),
}


@pytest.mark.parametrize("name", PATHS)
def test_token_paths(name: str) -> None:
    example, path = PATHS[name]
    assert token_path(example).tolist() == path
    assert set(token_columns(example)) <= set(example)


def test_unknown_examples_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"keys text, label\. Expected token ids under input_ids; chosen_ids"):
        token_path({"text": "x", "label": 1})
    with pytest.raises(InvalidInputError, match="bins=0"):
        SequenceBalancingCollator(list, bins=0)


@settings(max_examples=100)
@given(sequence_batches(10), st.integers(1, 4))
def test_the_same_examples_in_another_order(sequences: Sequences, bins: int) -> None:
    examples = [{"input_ids": sequence, "row": row} for row, sequence in enumerate(sequences)]
    batch = SequenceBalancingCollator(list, bins)(examples)
    assert sorted(example["row"] for example in batch) == list(range(len(examples)))
    if bins == 1:
        tokens = [example["input_ids"] for example in batch]
        assert tokens == sorted(tokens), "depth-first"
        assert PrefixTree.from_sequences(tokens).order.tolist() == list(range(len(tokens)))


def test_parts_cost_alike_and_keep_siblings() -> None:
    """Two families of long and short sequences: each part of the batch is a family, or equal work."""
    families = [[run(20, seed=seed) + run(4, seed=10 * seed + i) for i in range(1, 3)] for seed in range(4)]
    rows = [{"input_ids": families[i % 4][i // 4]} for i in range(8)]
    batch = SequenceBalancingCollator(list, 4)(rows)
    parts = [batch[i : i + 2] for i in range(0, 8, 2)]
    assert all(PrefixTree.from_sequences([x["input_ids"] for x in part]).tree_tokens == 28 for part in parts)
    lengths = [{"input_ids": run(n, seed=n)} for n in (100, 90, 80, 10, 20, 30)]
    parts = torch.tensor([len(x["input_ids"]) for x in SequenceBalancingCollator(list, 3)(lengths)]).view(3, 2)
    assert parts.sum(dim=1).tolist() == [110, 110, 110]


def test_a_function_may_give_the_tokens() -> None:
    collator = SequenceBalancingCollator("".join, token_ids=lambda text: [ord(letter) for letter in text])
    assert collator(["b", "aa", "a"]) == "aaab"
