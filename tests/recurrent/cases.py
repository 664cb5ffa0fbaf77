"""Random rows for the tests of recurrent operations, and what is compared: outputs, states and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.tree.trie import PrefixTree

Op = Callable[..., tuple[torch.Tensor, torch.Tensor]]
TREES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)


def plan_of(sequences: Sequence[Sequence[int]], leaves: Sequence[int] = ()) -> StatePlan:
    return StatePlan.from_depth(PrefixTree.from_sequences([list(s) for s in sequences]).depth, leaves)


def star(prompt: int, answer: int, count: int) -> list[list[int]]:
    return [[0] * prompt + [1 + i] * answer for i in range(count)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def delta_rule_inputs(is_kda: bool, tokens: int, strength: float = 1.0) -> list[torch.Tensor]:
    """query, key, value, g, beta and the state that comes in. strength: how fast states decay."""
    heads, width, out = 2 if is_kda else 4, 4, 3
    g = -strength * random(1, tokens, heads, *([width] if is_kda else []), seed=3).exp()
    beta = random(1, tokens, heads, seed=4).sigmoid()
    keys = [random(1, tokens, 2, width, seed=seed) for seed in (0, 1)]
    return [*keys, random(1, tokens, heads, out, seed=2), g, beta, random(1, heads, width, out, seed=5)]


def outcome(op: Op, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, states and the gradients of a random weighting of both, for every input."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out, states = op(*leaves)
    loss = (out.double() * random(*out.shape)).sum() + (states.double() * random(*states.shape)).sum()
    loss.backward()
    return [out.detach(), states.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor where that is above 1."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def swapped(plan: StatePlan) -> StatePlan:
    """The plan with the parent of the last fork's child one token further up."""
    parent = plan.parent.copy()
    child = int(np.flatnonzero(parent != np.arange(-1, len(parent) - 1))[-1])
    parent[child] = parent[parent[child]]
    return StatePlan(parent, plan.leaves)
