"""Convolutions on trees against the specification, and against transformers' own function on every path alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn

from dta_plugin.errors import UnsupportedError
from dta_plugin.recurrent.convolution import tree_causal_conv1d
from dta_plugin.recurrent.plan import StatePlan
from tests.recurrent import reference
from tests.recurrent.cases import TREES, Op, error, outcome, plan_of, random, star, swapped
from tests.recurrent.kernels import convolution

_FLOAT32, _FLOAT64 = 1e-5, 1e-10


def _inputs(tokens: int, width: int = 4, channels: int = 5) -> list[torch.Tensor]:
    """x, weight, bias and the state that comes in."""
    return [
        random(1, tokens, channels).transpose(1, 2),
        random(channels, width, seed=1),
        random(channels, seed=2),
        random(1, channels, width - 1, seed=3),
    ]


def _on(op: Op, plan: StatePlan, activation: str | None = "silu") -> Op:
    return lambda x, weight, bias, initial: op(x, weight, bias, activation, plan, initial)


@settings(max_examples=20, deadline=None)
@given(TREES, st.integers(1, 5), st.sampled_from(["silu", None]), st.data())
def test_random_trees(trees: list[list[int]], width: int, activation: str | None, data: st.DataObject) -> None:
    tokens = len(plan_of(trees))
    plan = plan_of(trees, sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3))))
    inputs = _inputs(tokens, width)
    expected = outcome(_on(reference.causal_conv1d, plan, activation), inputs, torch.float64)
    assert error(outcome(_on(tree_causal_conv1d, plan, activation), inputs, torch.float64), expected) < _FLOAT64
    assert error(outcome(_on(tree_causal_conv1d, plan, activation), inputs, torch.float32), expected) < _FLOAT32


def _by_kernel(*x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tree_causal_conv1d(*x, convolution)


@settings(max_examples=20, deadline=None)
@given(TREES, st.integers(1, 5), st.sampled_from(["silu", None]), st.data())
def test_one_long_row_for_a_kernel(
    trees: list[list[int]], width: int, activation: str | None, data: st.DataObject
) -> None:
    tokens = len(plan_of(trees))
    plan = plan_of(trees, sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3))))
    inputs = _inputs(tokens, width)
    expected = outcome(_on(reference.causal_conv1d, plan, activation), inputs, torch.float64)
    assert error(outcome(_on(_by_kernel, plan, activation), inputs, torch.float64), expected) < _FLOAT64


def test_nothing_comes_in() -> None:
    plan = plan_of([[0, 1, 2], [3], [4, 5], [4, 6, 7, 8]], [0, 2])
    x, weight, *_ = _inputs(len(plan))
    found, expected = (
        outcome(lambda *x, op=op: op(*x, None, None, plan, None), [x, weight], torch.float64)
        for op in (tree_causal_conv1d, reference.causal_conv1d)
    )
    assert error(found, expected) < _FLOAT64


@pytest.mark.parametrize("width", [2, 4])
def test_equals_transformers_on_every_path(width: int) -> None:
    plan = plan_of([*star(6, 3, 3), [0] * 6 + [1, 9], [8, 8]])

    def stock(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outs: dict[int, torch.Tensor] = {}
        for path in reference.paths(plan):
            out = causal_conv1d_fn(x[..., path], weight, bias, "silu")
            outs |= {token: out[0, :, i] for i, token in enumerate(path) if token not in outs}
        return torch.stack([outs[token] for token in range(len(plan))], -1).unsqueeze(0), x.new_zeros(0, 5, width - 1)

    inputs = _inputs(len(plan), width)[:3]
    found = outcome(lambda x, w, b: tree_causal_conv1d(x, w, b, "silu", plan), inputs, torch.float64)
    assert error(found, outcome(stock, inputs, torch.float64)) < _FLOAT64


@pytest.mark.parametrize("cut", [False, True], ids=["", "gradient dropped at the fork"])
def test_a_row_in_two_pieces(cut: bool) -> None:
    whole, first, second = plan_of(star(7, 2, 2), [8]), plan_of([[0] * 7], [6]), plan_of(star(0, 2, 2), [1])

    def in_pieces(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, initial: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        above, handed = tree_causal_conv1d(x[..., :7], weight, bias, "silu", first, initial)
        below, states = tree_causal_conv1d(x[..., 7:], weight, bias, "silu", second, handed.detach() if cut else handed)
        return torch.cat([above, below], -1), states

    inputs = _inputs(len(whole))
    found = outcome(in_pieces, inputs, torch.float64)
    assert (error(found, outcome(_on(tree_causal_conv1d, whole), inputs, torch.float64)) < _FLOAT64) != cut


@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision_rounds_where_transformers_does(is_autocast: bool) -> None:
    plan = plan_of(star(0, 20, 1))
    x, weight, bias, _ = (t.to(torch.float32 if is_autocast else torch.bfloat16) for t in _inputs(len(plan)))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found, states = tree_causal_conv1d(x, weight, bias, "silu", plan)
        expected = causal_conv1d_fn(x, weight, bias, "silu")
    assert found.dtype == states.dtype == expected.dtype == x.dtype
    assert error([found], [expected]) < 2e-2
    if not is_autocast:
        assert (found == expected).float().mean() > 0.95


def test_another_parent_is_noticed() -> None:
    plan = plan_of(star(9, 3, 2), [8])
    inputs = _inputs(len(plan))
    expected = outcome(_on(reference.causal_conv1d, plan), inputs, torch.float64)
    assert error(outcome(_on(tree_causal_conv1d, swapped(plan)), inputs, torch.float64), expected) > 1e-3


def test_no_gradient_from_what_is_replaced() -> None:
    plan = plan_of(star(4, 3, 2))
    x, weight, bias, _ = _inputs(len(plan))
    x = x.clone().index_fill(2, torch.tensor([6]), torch.nan).requires_grad_()  # the token before the second child
    out, _ = tree_causal_conv1d(x, weight, bias, None, plan)
    assert out[..., 7:].isfinite().all()
    (grad,) = torch.autograd.grad(out[..., 7:].sum(), x)
    assert not grad[..., 4:7].any() and grad[..., :4].any()


def test_activations() -> None:
    plan = plan_of([[0, 1]])
    x, weight, bias, _ = _inputs(2)
    outs = [tree_causal_conv1d(x, weight, bias, act, plan)[0] for act in ("silu", "swish", torch.nn.SiLU())]
    assert all(torch.equal(out, outs[0]) for out in outs)
    with pytest.raises(UnsupportedError, match="'unheard'"):
        tree_causal_conv1d(x, weight, bias, "unheard", plan)
