"""The scans of Mamba 2 and Mamba 1 on trees against their specification, and against transformers path by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bamba import modeling_bamba
from transformers.models.jamba import modeling_jamba

from dta_plugin.recurrent import selective_scan, state_space
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.tree.trie import PrefixTree
from tests.recurrent import reference_state_space

_HEADS, _WIDTH, _STATES = 4, 3, 5
_SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=70), min_size=1, max_size=5)
_SHAPES = {
    "forks inside and between blocks": [[0] * n + [1] * m for n, m in ((5, 70), (31, 3), (32, 33), (33, 1), (64, 9))],
    "a forest": [[0, 1, 0], [1] * 40, [1] * 3 + [0] * 40],
    "one sequence": [[0] * 150],
    "single tokens": [[0], [1], [2]],
}


@dataclass(frozen=True)
class Scan:
    """A scan on trees with its specification and transformers' own; `time` is the dimension of tokens of an input."""

    on_tree: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    specified: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    stock: Callable[..., torch.Tensor]
    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    initial: tuple[int, ...]
    time: int
    per_token: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        drawn = {name: torch.randn(shape, dtype=dtype) for name, shape in self.shapes(tokens).items()}
        drawn["A"] = -drawn["A"].exp()
        return {name: tensor.requires_grad_() for name, tensor in drawn.items()}

    def start(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(self.initial, dtype=dtype).requires_grad_()

    def at(self, inputs: dict[str, torch.Tensor], tokens: Iterable[int]) -> dict[str, torch.Tensor]:
        """The inputs of some tokens of the row."""
        picked = {name: self.along(inputs[name], list(tokens)) for name in self.per_token}
        return inputs | picked

    def along(self, out: torch.Tensor, path: list[int]) -> torch.Tensor:
        return out.index_select(self.time, torch.tensor(path))


def _mamba2_shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    return {
        "hidden_states": (1, tokens, _HEADS, _WIDTH),
        "dt": (1, tokens, _HEADS),
        "A": (_HEADS,),
        "B": (1, tokens, 2, _STATES),
        "C": (1, tokens, 2, _STATES),
        "D": (_HEADS,),
        "dt_bias": (_HEADS,),
    }


def _mamba_shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    return {
        "hidden_states": (1, _WIDTH, tokens),
        "dt": (1, _WIDTH, tokens),
        "A": (_WIDTH, _STATES),
        "B": (1, _STATES, tokens),
        "C": (1, _STATES, tokens),
        "D": (_WIDTH,),
        "z": (1, _WIDTH, tokens),
        "delta_bias": (_WIDTH,),
    }


def _stock_mamba2(**inputs: Any) -> torch.Tensor:
    return modeling_bamba.mamba2_chunk_scan(**inputs, chunk_size=16)


MAMBA2 = Scan(
    state_space.tree_mamba2_scan,
    reference_state_space.mamba2_scan,
    _stock_mamba2,
    _mamba2_shapes,
    (1, _HEADS, _WIDTH, _STATES),
    1,
    ("hidden_states", "dt", "B", "C"),
    {"dt_softplus": True, "dt_limit": (0.05, 1.5)},
)
MAMBA = Scan(
    selective_scan.tree_selective_scan,
    reference_state_space.selective_scan,
    modeling_jamba.mamba_selective_scan,
    _mamba_shapes,
    (1, _WIDTH, _STATES),
    2,
    ("hidden_states", "dt", "B", "C", "z"),
    {"delta_softplus": True},
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


both = pytest.mark.parametrize("scan", [MAMBA2, MAMBA], ids=["mamba2", "mamba"])


def _gradients(outputs: Any, inputs: Any) -> list[torch.Tensor]:
    """Of a sum with weights that depend on the places of the outputs alone."""
    draw = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).sum() for out in outputs)
    return list(torch.autograd.grad(total, list(inputs), retain_graph=True, allow_unused=True))


def _worst(found: Any, expected: Any) -> float:
    """The largest difference of two lists of tensors, relative to the largest entry of each, or to 1."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def _compare(scan: Scan, plan: StatePlan, specified: StatePlan | None = None, **more: torch.Tensor) -> float:
    inputs = scan.inputs(len(plan)) | more
    start = scan.start()
    found = scan.on_tree(**inputs, **scan.options, plan=plan, initial=start)
    expected = scan.specified(**inputs, **scan.options, plan=specified or plan, initial=start)
    given = [*inputs.values(), start]
    return max(_worst(found, expected), _worst(_gradients(found, given), _gradients(expected, given)))


@both
@settings(max_examples=6, deadline=None)
@given(sequences=_SEQUENCES, data=st.data())
def test_random_trees(scan: Scan, sequences: list[list[int]], data: st.DataObject) -> None:
    tree = PrefixTree.from_sequences(sequences)
    leaves = sorted(data.draw(st.sets(st.integers(0, tree.tree_tokens - 1), max_size=3)))
    assert _compare(scan, StatePlan.from_depth(tree.depth, leaves)) < 1e-10


@both
@pytest.mark.parametrize("shape", _SHAPES)
def test_shapes(scan: Scan, shape: str) -> None:
    tree = PrefixTree.from_sequences(_SHAPES[shape])
    assert _compare(scan, StatePlan.from_depth(tree.depth, [0, tree.tree_tokens - 1])) < 1e-10


@both
def test_forks_at_every_offset_of_a_block(scan: Scan) -> None:
    tree = PrefixTree.from_sequences([[0] * n + [1] * 3 for n in range(1, 34)])
    assert _compare(scan, StatePlan.from_depth(tree.depth, range(0, tree.tree_tokens, 9))) < 1e-10


def test_gate_of_mamba2() -> None:
    z = torch.randn(1, 7, _HEADS, _WIDTH, dtype=torch.float64).requires_grad_()
    assert _compare(MAMBA2, StatePlan.from_depth(np.arange(7)), z=z) < 1e-10


@both
def test_every_path_alone_through_transformers(scan: Scan) -> None:
    plan, paths = _forked()
    inputs = scan.inputs(len(plan), torch.float32)
    out, _ = scan.on_tree(**inputs, **scan.options, plan=plan)
    found = [scan.along(out, path) for path in paths]
    expected = [scan.stock(**scan.at(inputs, path), **scan.options) for path in paths]
    assert out.dtype == expected[0].dtype
    assert _worst(found, expected) < 1e-5
    assert _worst(_gradients(found, inputs.values()), _gradients(expected, inputs.values())) < 1e-5


@both
def test_half_precision_is_no_worse_than_transformers(scan: Scan) -> None:
    plan, paths = _forked()
    drawn = {name: tensor.detach() for name, tensor in scan.inputs(len(plan), torch.float32).items()}
    wide = ("A", "D")  # the models keep these in float32
    inputs = {name: (x if name in wide else x.bfloat16()).requires_grad_() for name, x in drawn.items()}
    out, _ = scan.on_tree(**inputs, **scan.options, plan=plan)
    true, _ = scan.specified(**inputs, **scan.options, plan=plan)
    found, truth = ([scan.along(whole, path) for path in paths] for whole in (out, true))
    stock = [scan.stock(**scan.at(inputs, path), **scan.options) for path in paths]
    assert out.dtype == stock[0].dtype
    assert _worst(found, truth) < 1.2 * _worst(stock, truth)
    gradients = [_gradients(outputs, inputs.values()) for outputs in (found, stock, truth)]
    assert _worst(gradients[0], gradients[2]) < 1.2 * _worst(gradients[1], gradients[2])


def _forked() -> tuple[StatePlan, list[list[int]]]:
    """A tree, and the tokens of each path from its root to a leaf."""
    tree = PrefixTree.from_sequences(_SHAPES["forks inside and between blocks"])
    plan = StatePlan.from_depth(tree.depth)
    return plan, [_path(plan, end) for end in range(len(plan)) if end not in plan.parent]


def _path(plan: StatePlan, end: int) -> list[int]:
    path = [end]
    while plan.parent[path[-1]] >= 0:
        path.append(int(plan.parent[path[-1]]))
    return path[::-1]


@both
def test_where_nothing_forks_it_is_the_stock_scan(scan: Scan) -> None:
    inputs = scan.inputs(100, torch.float32)
    found, _ = scan.on_tree(**inputs, **scan.options, plan=StatePlan.from_depth(np.arange(100)))
    torch.testing.assert_close(found, scan.stock(**inputs, **scan.options), rtol=2e-6, atol=2e-6)


@both
def test_two_rows_are_one(scan: Scan) -> None:
    """A trunk of 40 tokens and two branches: at once, or the branches from the state behind the trunk."""
    depth = np.concatenate([np.arange(60), np.arange(40, 75)])
    inputs, start = scan.inputs(len(depth)), scan.start()
    whole, _ = scan.on_tree(**inputs, **scan.options, plan=StatePlan.from_depth(depth), initial=start)
    trunk = scan.at(inputs, range(40))
    first, states = scan.on_tree(**trunk, **scan.options, plan=StatePlan.from_depth(depth[:40], [39]), initial=start)
    branches = scan.at(inputs, range(40, len(depth)))
    second, _ = scan.on_tree(**branches, **scan.options, plan=StatePlan.from_depth(depth[40:]), initial=states)
    pieces = torch.cat([first, second], dim=scan.time)
    given = [*inputs.values(), start]
    assert _worst([pieces], [whole]) < 1e-10
    assert _worst(_gradients([pieces], given), _gradients([whole], given)) < 1e-10
    dropped, _ = scan.on_tree(
        **branches, **scan.options, plan=StatePlan.from_depth(depth[40:]), initial=states.detach()
    )
    dropped = torch.cat([first, dropped], dim=scan.time)
    assert _worst(_gradients([dropped], given), _gradients([whole], given)) > 1e-2


@both
def test_a_sibling_is_no_parent(scan: Scan) -> None:
    depth = np.array([0, 1, 2, 1, 2, 1])
    plan = StatePlan.from_depth(depth)
    wrong = StatePlan(np.where(plan.parent == 3, 1, plan.parent), plan.leaves)
    assert (wrong.parent != plan.parent).sum() == 1
    assert _compare(scan, plan) < 1e-10 < 1e-2 < _compare(scan, plan, wrong)


@both
def test_autocast_changes_nothing(scan: Scan) -> None:
    inputs, plan = scan.inputs(20, torch.float32), StatePlan.from_depth(np.arange(20))
    expected, _ = scan.on_tree(**inputs, **scan.options, plan=plan)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = scan.on_tree(**inputs, **scan.options, plan=plan)
    assert torch.equal(found, expected)
