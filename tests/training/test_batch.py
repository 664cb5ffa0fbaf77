"""Rows as sequences: what padding hides, where completions begin, what runs if a loss reads some tokens only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.training.batch import RowBatch


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of (prompt, completion) pairs, prompts padded left and completions right, with -1."""
    before, columns = max(len(prompt) for prompt, _ in rows), max(len(completion) for _, completion in rows)
    ids = [
        [-1] * (before - len(prompt)) + prompt + completion + [-1] * (columns - len(completion))
        for prompt, completion in rows
    ]
    tokens = torch.tensor(ids)
    return tokens, (tokens >= 0).long(), columns


ROWS = [([1, 2, 3], [4, 5]), ([9], [8]), ([1, 2, 3], [4, 6, 7]), ([9], [])]


def test_from_padded() -> None:
    batch = RowBatch.from_padded(*padded(ROWS))
    assert [row.tolist() for row in batch.sequences] == [prompt + completion for prompt, completion in ROWS]
    assert batch.prompt_lengths == batch.scored == [3, 1, 3, 1]
    assert (len(batch), batch.tokens, batch.most_scored) == (4, 14, 3)
    assert batch.groups == [0, 1, 0, 1]
    masks = [[False] * len(prompt) + [True] * len(completion) for prompt, completion in ROWS]
    assert [mask.tolist() for mask in batch.scored_masks()] == masks


def test_a_row_without_a_prompt() -> None:
    ids, mask, columns = padded(ROWS)
    mask[1, :3] = 0
    with pytest.raises(InvalidInputError, match=r"Row 1 has no prompt token\. Expected at least one"):
        RowBatch.from_padded(ids, mask, columns)


@pytest.mark.parametrize("seed", range(20))
def test_what_runs_of_what_is_read(seed: int) -> None:
    """All that comes before the last token that is read, and no more; a first token for the rest of the batch."""
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 3, rng.integers(1, 5)).tolist(), rng.integers(0, 3, rng.integers(0, 6)).tolist())
            for _ in range(6)]  # fmt: skip
    batch = RowBatch.from_padded(*padded(rows))
    masks = [mask & (rng.random(len(mask)) < 0.4) for mask in batch.scored_masks()]
    found = batch.up_to_last_read(masks)
    for row, (sequence, mask) in enumerate(zip(found.sequences, found.scored_masks(), strict=True)):
        read = np.flatnonzero(masks[row])
        assert len(sequence) == (read[-1] + 1 if len(read) else 1)
        assert np.flatnonzero(mask).tolist() == read.tolist()
        assert sequence.tolist() == batch.sequences[row][: len(sequence)].tolist()
    assert found.scored is found.masks and found.prompt_lengths == batch.prompt_lengths


def test_joined_batches() -> None:
    whole = RowBatch.from_padded(*padded(ROWS))
    cut = whole.up_to_last_read([np.zeros(len(row), dtype=bool) for row in whole.sequences])
    assert RowBatch.joined([whole, whole]).scored == whole.prompt_lengths * 2
    both = RowBatch.joined([whole, cut])
    assert both.equals(RowBatch.joined([whole, cut])) and not both.equals(RowBatch.joined([cut, whole]))
    assert [int(mask.sum()) for mask in both.scored_masks()] == [2, 1, 3, 0, 0, 0, 0, 0]
