"""Rows of different lengths as one rectangle: what is read padded left, what is written padded right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Tokens = Sequence[int] | np.ndarray


def side_by_side(sequences: Sequence[Tokens], begins: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, P + C]: prompts end, and completions begin, in the same column.

    sequences: a prompt and its completion in one. begins: where the completion begins; P is the largest of them. pad:
    the id at padding, where the mask is 0.
    """
    prompt = max(begins)
    width = prompt + max(len(row) - begin for row, begin in zip(sequences, begins, strict=True))
    ids = np.full((len(sequences), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for line, real, row, begin in zip(ids, mask, sequences, begins, strict=True):
        place = slice(prompt - begin, prompt - begin + len(row))
        line[place], real[place] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def left_padded(prompts: Sequence[Tokens], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, P]: every prompt at the end of its row."""
    return side_by_side(prompts, [len(prompt) for prompt in prompts], pad)
