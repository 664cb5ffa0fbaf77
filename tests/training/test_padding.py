"""Prompts and completions side by side: every token where it belongs, and nothing else marked as real."""

from __future__ import annotations

import numpy as np
import pytest

from dta_plugin.training.padding import left_padded, side_by_side

PAD = 99
ROWS = [[3, 4, 5, 6], np.array([7, 8]), [9, 10, 11, 12, 13, 14]]


@pytest.mark.parametrize("begins", [[1, 1, 1], [3, 1, 2], [4, 2, 6]], ids=str)
def test_completions_begin_in_one_column(begins: list[int]) -> None:
    ids, mask = side_by_side(ROWS, begins, PAD)
    first, longest = max(begins), max(len(row) - begin for row, begin in zip(ROWS, begins, strict=True))
    assert ids.shape == mask.shape == (3, first + longest)
    for line, real, row, begin in zip(ids.tolist(), mask.tolist(), ROWS, begins, strict=True):
        left, right = first - begin, longest - (len(row) - begin)
        assert line == [PAD] * left + list(row) + [PAD] * right
        assert real == [0] * left + [1] * len(row) + [0] * right


def test_prompts_end_in_the_last_column() -> None:
    ids, mask = left_padded(ROWS, PAD)
    assert ids[:, -1].tolist() == [6, 8, 14] and mask.sum(dim=1).tolist() == [4, 2, 6]
    assert ids[1].tolist() == [PAD] * 4 + [7, 8] and ids.dtype == mask.dtype
