"""What benchmarks share: gradients that differ are told, saved bytes are counted, curves are means of what they say."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.common.backward import SavedBytes, gradient_error
from benchmarks.common.curves import reward_cells, smoothed


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_gradients_that_differ_are_told(factor: float) -> None:
    expected = {"a": torch.randn(4), "b": torch.randn(4)}
    assert gradient_error(expected, expected) == 0.0
    assert gradient_error(expected | {"b": factor * expected["b"]}, expected) > 9e-4
    assert gradient_error({"a": expected["a"]}, expected) == math.inf


def test_saved_bytes_count_every_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    saved = SavedBytes(layer)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        x = torch.randn(8, 4, requires_grad=True)
        loss = (layer(x) + layer(x[:4]).sum()).sum()
    assert saved.live == saved.peak == x.nbytes
    loss.backward()
    del loss
    assert saved.live == 0


def test_rewards_of_learning_curves() -> None:
    runs = [{"reward": [0.2] * 2 + [0.5] * 16 + [0.8 + 0.1 * seed] * 2} for seed in (0, 1)]
    assert reward_cells(runs) == ("0.200 +- 0.000", "0.850 +- 0.071", "0.505 +- 0.007")
    assert smoothed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
