"""Sums of gradients over chunks: wide enough, complete, and without a second set of gradients in memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from dta_plugin.execution.streaming.gradient_sums import GradientSums


def test_many_small_gradients_do_not_stall_in_bfloat16() -> None:
    weight = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    sums = GradientSums()
    for _ in range(1000):
        sums.add([weight.sum()], [torch.ones((), dtype=torch.bfloat16)], {"w": weight})
    (total,) = sums.hand_out({"w": weight})
    assert total is not None and total.dtype == torch.bfloat16
    torch.testing.assert_close(total, torch.full_like(total, 1000))


def test_gradients_are_taken_one_by_one() -> None:
    weights = {str(i): torch.ones(8, requires_grad=True) for i in range(5)}
    found: list[torch.Tensor] = []
    own = torch.autograd.grad

    def spy(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        found.extend(own(*arguments, **options))
        return tuple(found)

    with patch("torch.autograd.grad", spy):
        GradientSums().add([torch.stack(list(weights.values())).sum()], [torch.ones(())], weights)
    assert [g.untyped_storage().nbytes() for g in found] == [4] * 5


def test_a_gradient_that_no_hook_took_is_not_lost() -> None:
    """As on torch 2.8, where a parameter saved under checkpointing forgets its hooks."""
    weight = torch.ones(4, requires_grad=True)
    sums = GradientSums()
    handle = weight.register_hook(lambda g: g)
    with patch.object(torch.Tensor, "register_hook", lambda self, hook: handle):
        sums.add([(3 * weight).sum()], [torch.ones(())], {"w": weight})
    (total,) = sums.hand_out({"w": weight})
    assert total is not None
    torch.testing.assert_close(total, torch.full((4,), 3.0))


def test_unused_parameters_get_none_and_sums_are_handed_out_once() -> None:
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    sums = GradientSums()
    sums.add([used.sum()], [torch.ones(())], {"used": used, "unused": unused})
    totals = list(sums.hand_out({"used": used, "unused": unused}))
    assert totals[0] is not None and totals[1] is None
    assert list(sums.hand_out({"used": used})) == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complete_leaves_the_whole_sum_in_grad(dtype: torch.dtype) -> None:
    weight = torch.ones(2, dtype=dtype, requires_grad=True)
    weight.grad = torch.full((2,), 10, dtype=dtype)  # of an earlier micro-batch
    sums, one = GradientSums(), torch.ones((), dtype=dtype)
    sums.add([(2 * weight).sum()], [one], {"w": weight})
    sums.complete([(3 * weight).sum()], [one], {"w": weight})
    torch.testing.assert_close(weight.grad, torch.full((2,), 15, dtype=dtype))
