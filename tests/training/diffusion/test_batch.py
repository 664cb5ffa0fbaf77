"""DiffusionBatch: the same rows, however they come; and seeds that belong to rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dta_plugin.training.diffusion.batch import DiffusionBatch, Rollout, content_seed, draw_seeds

SEQUENCES = [np.array([3, 4, 5, 6]), np.array([7, 8]), np.array([9, 10, 11, 12, 13, 14])]
BEGINS, SEEDS = [3, 1, 2], [11, 12, 13]


def batch() -> DiffusionBatch:
    return DiffusionBatch.from_sequences(SEQUENCES, BEGINS, SEEDS, pad=0)


def test_padded_and_unpadded_rows_are_one() -> None:
    found = batch()
    rows, mask = found.input_ids, found.attention_mask
    same = DiffusionBatch.from_padded(rows[:, :3], mask[:, :3], rows[:, 3:], mask[:, 3:], found.seeds)
    assert torch.equal(same.input_ids, rows) and torch.equal(same.attention_mask, mask)
    assert same.width == found.width == 4
    assert same.lengths.tolist() == found.lengths.tolist() == [1, 1, 4]


def test_chunks() -> None:
    found = batch()
    first, last = found.chunks(2)
    assert (len(first), len(last), last.width) == (2, 1, 4)
    assert torch.equal(torch.cat([first.input_ids, last.input_ids]), found.input_ids)
    assert first.seeds.tolist() + last.seeds.tolist() == SEEDS
    canvas = torch.arange(12).view(3, 4)
    parts = replace(found, rollout=Rollout(canvas, -canvas)).chunks(2)
    assert all(part.rollout is not None and torch.equal(part.rollout.steps, -part.rollout.canvas_ids) for part in parts)
    assert [part.rollout.canvas_ids.tolist() for part in parts if part.rollout] == [
        canvas[:2].tolist(),
        canvas[2:].tolist(),
    ]


def test_seeds_of_contents() -> None:
    seed = content_seed(SEQUENCES[0], 3, step=0)
    others = [content_seed(SEQUENCES[0], 2, 0), content_seed(SEQUENCES[0], 3, 1), content_seed(SEQUENCES[1], 1, 0)]
    assert seed == content_seed(SEQUENCES[0].astype(np.int32), 3, step=0) >= 0
    assert seed not in others and len(set(others)) == 3


def test_drawn_seeds_come_from_torch() -> None:
    torch.manual_seed(0)
    first = draw_seeds(4, torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(draw_seeds(4, torch.device("cpu")), first) and len(set(first.tolist())) == 4
