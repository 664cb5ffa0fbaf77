"""Delta rules on trees against the specification, and against transformers' own functions on every path alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from dta_plugin.recurrent import delta_rule
from dta_plugin.recurrent.delta_rule import tree_gated_delta_rule, tree_kda
from dta_plugin.recurrent.plan import StatePlan
from tests.recurrent import reference
from tests.recurrent.cases import TREES, Op, delta_rule_inputs, error, outcome, plan_of, star, swapped

_FLOAT32, _FLOAT64 = 1e-5, 1e-10
_STOCK = {tree_gated_delta_rule: torch_chunk_gated_delta_rule, tree_kda: chunk_kimi_delta_attention}
_SPECIFIED = {tree_gated_delta_rule: reference.gated_delta_rule, tree_kda: reference.kda}
both = pytest.mark.parametrize("op", [tree_gated_delta_rule, tree_kda])


def _inputs(op: Op, tokens: int, strength: float = 1.0) -> list[torch.Tensor]:
    return delta_rule_inputs(op is tree_kda, tokens, strength)


def _on(op: Op, plan: StatePlan, normalised: bool = True) -> Op:
    return lambda *x: op(*x[:5], plan, x[5] if len(x) > 5 else None, normalised)


def _fix_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(delta_rule, "_block_size", lambda *_: size)


@both
@settings(max_examples=8, deadline=None)
@given(TREES, st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans(), st.data())
def test_random_trees(op: Op, trees: list[list[int]], size: int, comes_in: bool, normalised: bool, data) -> None:
    tokens = len(plan_of(trees))
    plan = plan_of(trees, sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3))))
    inputs = _inputs(op, tokens)[: 6 if comes_in else 5]
    expected = outcome(_on(_SPECIFIED[op], plan, normalised), inputs, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        _fix_size(patch, size)
        assert error(outcome(_on(op, plan, normalised), inputs, torch.float64), expected) < _FLOAT64
        assert error(outcome(_on(op, plan, normalised), inputs, torch.float32), expected) < _FLOAT32


@both
@pytest.mark.parametrize("fork", range(1, 10))
def test_forks_at_every_offset_in_a_block(op: Op, fork: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(star(fork, 5, 2), [fork - 1])
    _fix_size(monkeypatch, 4)
    inputs = _inputs(op, len(plan))
    expected = outcome(_on(_SPECIFIED[op], plan), inputs, torch.float64)
    assert error(outcome(_on(op, plan), inputs, torch.float64), expected) < _FLOAT64


@both
@pytest.mark.parametrize("sequences", [star(70, 9, 3), star(0, 40, 1)], ids=["star", "one sequence"])
def test_equals_transformers_on_every_path(op: Op, sequences: list[list[int]]) -> None:
    plan = plan_of(sequences)

    def stock(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outs: dict[int, torch.Tensor] = {}
        for path in reference.paths(plan):
            own = [t[:, path] for t in x[:5]]
            out, _ = _STOCK[op](*own, initial_state=x[5], use_qk_l2norm_in_kernel=True)
            outs |= {token: out[0, i] for i, token in enumerate(path) if token not in outs}
        return torch.stack([outs[token] for token in range(len(plan))]).unsqueeze(0), x[5][:0]

    inputs = _inputs(op, len(plan))
    expected = outcome(stock, inputs, torch.float32)
    assert error(outcome(_on(op, plan), inputs, torch.float32), expected) < _FLOAT32


@both
@pytest.mark.parametrize("cut", [False, True], ids=["", "gradient dropped at the fork"])
def test_a_row_in_two_pieces(op: Op, cut: bool) -> None:
    whole = plan_of([[0] * 11 + [1] * 6, [0] * 11 + [2] * 7, [0] * 5 + [3] * 4], [16])
    first, second = plan_of([[0] * 11, [0] * 5 + [3] * 4], [10]), plan_of([[1] * 6, [2] * 7], [5])
    one, two = [*range(11), *range(24, 28)], [*range(11, 24)]

    def in_pieces(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        above, handed = op(*(t[:, one] for t in x[:5]), first, x[5])
        below, states = op(*(t[:, two] for t in x[:5]), second, handed.detach() if cut else handed)
        return torch.cat([above, below], 1)[:, np.argsort([*one, *two])], states

    inputs = _inputs(op, len(whole), strength=0.1)
    expected = outcome(_on(op, whole, False), inputs, torch.float64)
    found = outcome(in_pieces, inputs, torch.float64)
    assert (error(found, expected) < _FLOAT64) != cut


@both
def test_decays_beyond_the_range_of_exponentials(op: Op) -> None:
    plan = plan_of(star(40, 9, 3))
    inputs = _inputs(op, len(plan), strength=30.0)
    expected = outcome(_on(_SPECIFIED[op], plan), inputs, torch.float64)
    assert error(outcome(_on(op, plan), inputs, torch.float64), expected) < _FLOAT64
    found = outcome(_on(op, plan), inputs, torch.float32)
    assert all(x.isfinite().all() for x in found)
    assert error(found, expected) < 1e-4  # sums of decays up to 2,000 in float32, as transformers'


@both
def test_half_precision_in_and_out(op: Op) -> None:
    plan = plan_of(star(5, 3, 2), [4])
    inputs = [x.bfloat16() for x in _inputs(op, len(plan))]
    out, states = op(*inputs[:5], plan, inputs[5])
    exact, exact_states = op(*(x.float() for x in inputs[:5]), plan, inputs[5].float())
    assert out.dtype == torch.bfloat16 and states.dtype == torch.float32
    assert torch.equal(out, exact.bfloat16()) and torch.equal(states, exact_states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(*(x.float() for x in inputs[:5]), plan, inputs[5].float())[0], exact)


@both
@pytest.mark.parametrize("break_it", [swapped, lambda plan: StatePlan(np.minimum(plan.parent, 7), plan.leaves)])
def test_another_parent_is_noticed(op: Op, break_it: Callable[[StatePlan], StatePlan]) -> None:
    plan = plan_of(star(9, 3, 2), [8])
    inputs = _inputs(op, len(plan), strength=0.1)
    expected = outcome(_on(_SPECIFIED[op], plan), inputs, torch.float64)
    assert error(outcome(_on(op, break_it(plan)), inputs, torch.float64), expected) > 1e-3


@pytest.mark.parametrize("is_kda", [False, True])
def test_blocks_are_short_where_nodes_are(is_kda: bool) -> None:
    sizes = [
        delta_rule._block_size(plan, 64, is_kda)
        for plan in (plan_of(star(0, 512, 2)), plan_of(star(130, 37, 5)), plan_of(star(8, 5, 40)))
    ]
    assert sizes[0] == 64 and sizes == sorted(sizes, reverse=True) and sizes[2] == 16
