"""Blocks of tokens that attend both ways among themselves, as the tokens of an image do in Gemma 3 and Gemma 4.

A block is a run of the layout within one node. `reach` gives, for every token, the exclusive end of its block, or its
own index + 1 where it is in none: it never decreases, and two tokens are in one block iff their reach is the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

# What a layer makes of blocks: "causal", nothing; "windowed", both ways, as far as its sliding window goes back;
# "whole", both ways, and the window does not apply within a block. Without a window the last two are the same.
BlockRule = Literal["causal", "windowed", "whole"]


class Blocks(NamedTuple):
    """The blocks of a mask as plans need them. reach: int64 [T]. is_whole: the window does not apply within a block."""

    reach: np.ndarray
    is_whole: bool


def cut_before(reach: np.ndarray, place: int) -> int:
    """The last place up to `place` at which no block is cut in two."""
    if place == 0 or reach[place - 1] <= place:
        return place
    return int(np.searchsorted(reach, reach[place - 1]))


def cut_after(reach: np.ndarray, place: int) -> int:
    """The first place from `place` on at which no block is cut in two."""
    return place if place == 0 else max(place, int(reach[place - 1]))
