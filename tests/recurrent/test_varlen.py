"""Delta rules by kernels for several sequences in a row, with stand-ins for these, against the specification."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dta_plugin.recurrent import choice, fla
from dta_plugin.recurrent.choice import FLA_LEVELS, FLA_RESCAN, TORCH_SCAN, delta_rule_way, is_rescan_cheaper
from dta_plugin.recurrent.fla import CONVOLUTION, GATED_DELTA_RULE, KDA, serving_kernel
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.varlen import Inputs, by_levels, by_paths
from tests.recurrent import reference
from tests.recurrent.cases import TREES, Op, delta_rule_inputs, error, outcome, plan_of, star, swapped
from tests.recurrent.kernels import Kernel

_EXACT = 1e-10
_RULES = {GATED_DELTA_RULE: reference.gated_delta_rule, KDA: reference.kda}
rules = pytest.mark.parametrize("rule", list(_RULES))
ways = pytest.mark.parametrize("way", [by_levels, by_paths])


def _on(way: Callable, rule: str, plan: StatePlan, normalised: bool = True, kernel: Kernel | None = None) -> Op:
    run = kernel or Kernel(_RULES[rule])
    return lambda *x: way(run, Inputs(*x[:5]), plan, x[5] if len(x) > 5 else None, normalised)


def _specified(rule: str, plan: StatePlan, normalised: bool = True) -> Op:
    return lambda *x: _RULES[rule](*x[:5], plan, x[5] if len(x) > 5 else None, normalised)


@rules
@ways
@settings(max_examples=10, deadline=None)
@given(TREES, st.booleans(), st.booleans(), st.data())
def test_random_trees(way: Callable, rule: str, trees: list[list[int]], comes_in: bool, normalised: bool, data) -> None:
    tokens = len(plan_of(trees))
    plan = plan_of(trees, sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3))))
    inputs = delta_rule_inputs(rule == KDA, tokens)[: 6 if comes_in else 5]
    expected = outcome(_specified(rule, plan, normalised), inputs, torch.float64)
    assert error(outcome(_on(way, rule, plan, normalised), inputs, torch.float64), expected) < _EXACT


@rules
@ways
@pytest.mark.parametrize("cut", [False, True], ids=["", "gradient dropped at the fork"])
def test_a_row_in_two_pieces(way: Callable, rule: str, cut: bool) -> None:
    whole = plan_of([[0] * 11 + [1] * 6, [0] * 11 + [2] * 7, [0] * 5 + [3] * 4], [16])
    first, second = plan_of([[0] * 11, [0] * 5 + [3] * 4], [10]), plan_of([[1] * 6, [2] * 7], [5])
    one, two = [*range(11), *range(24, 28)], [*range(11, 24)]

    def in_pieces(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        above, handed = _on(way, rule, first, False)(*(t[:, one] for t in x[:5]), x[5])
        below, states = _on(way, rule, second, False)(*(t[:, two] for t in x[:5]), handed.detach() if cut else handed)
        return torch.cat([above, below], 1)[:, np.argsort([*one, *two])], states

    inputs = delta_rule_inputs(rule == KDA, len(whole), strength=0.1)
    expected = outcome(_specified(rule, whole, False), inputs, torch.float64)
    assert (error(outcome(in_pieces, inputs, torch.float64), expected) < _EXACT) != cut


@rules
@ways
def test_another_parent_is_noticed(way: Callable, rule: str) -> None:
    plan = plan_of(star(9, 3, 2), [8])
    inputs = delta_rule_inputs(rule == KDA, len(plan), strength=0.1)
    expected = outcome(_specified(rule, plan), inputs, torch.float64)
    assert error(outcome(_on(way, rule, swapped(plan)), inputs, torch.float64), expected) > 1e-3


def test_levels_compute_every_token_once_and_paths_in_one_call() -> None:
    plan = plan_of([[0] * 6 + [1] * 3 + [i] * 2 for i in (4, 5)] + [[0] * 6 + [2] * 5])
    inputs = Inputs(*delta_rule_inputs(False, len(plan))[:5])
    levels, paths = Kernel(reference.gated_delta_rule), Kernel(reference.gated_delta_rule)
    by_levels(levels, inputs, plan, None, True)
    by_paths(paths, inputs, plan, None, True)
    assert levels.calls == [(1, 6), (2, 8), (2, 4)]
    assert paths.calls == [(3, 33)] and plan.path_tokens() == 33


def test_a_rescan_keeps_no_more_than_the_row() -> None:
    plan = plan_of(star(40, 2, 8))
    saved = {}
    for way in (by_levels, by_paths):
        inputs = [x.requires_grad_() for x in delta_rule_inputs(False, len(plan))[:5]]
        sizes: dict[int, int] = {}

        def keep(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = way(Kernel(reference.gated_delta_rule), Inputs(*inputs), plan, None, True)
        saved[way] = sum(sizes.values())
        out.sum().backward()
    assert saved[by_paths] < saved[by_levels]


@ways
def test_gradients_of_shared_tokens_are_summed_in_float32(way: Callable) -> None:
    """In bfloat16, 256 terms of 1 and less would stop at 256."""
    plan = plan_of([[0], *([0, 1 + i] for i in range(600))])

    def kernel(q, k, v, g, beta, initial_state=None, output_final_state=False, cu_seqlens=None, **_):
        """Adds to values those of the sequence's first token."""
        first = v.float().index_select(1, cu_seqlens[:-1])
        state = first[0].unsqueeze(-2) + (0 if initial_state is None else initial_state)
        added = state if initial_state is None else initial_state
        spread = added.squeeze(-2).repeat_interleave(cu_seqlens.diff(), 0).unsqueeze(0)
        return (v + spread).to(v.dtype), state if output_final_state else None

    value = torch.ones(1, len(plan), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    rest = [torch.ones(1, len(plan), 1, *more, dtype=torch.bfloat16) for more in ([1], [1], [], [])]
    out, _ = way(kernel, Inputs(rest[0], rest[1], value, *rest[2:]), plan, None, False)
    out[:, 1:].float().sum().backward()
    assert value.grad is not None and value.grad[0, 0].item() == 600


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_serve_half_precision_on_gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "_imported", lambda name: name)
    served = [
        serving_kernel(GATED_DELTA_RULE, torch.device(device), dtype, *widths) is not None
        for dtype, widths in (
            (torch.bfloat16, (128, 128)),
            (torch.float16, (64, 256)),
            (torch.float32, (128, 128)),
            (torch.bfloat16, (512, 128)),
            (torch.bfloat16, (24, 128)),
        )
    ]
    assert served == ([True, True, False, False, False] if device == "cuda" else [False] * 5)


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (None, ""),
        ("0.3.2", "are known in 0.4, 0.5, 0.6"),
        ("0.7.0", "are known in"),
        ("0.6.1", "ValueError: no such key"),
    ],
)
def test_what_cannot_be_used_leaves_torch(
    release: str | None, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> None:
        raise ValueError("no such key")

    monkeypatch.setattr(fla, "_release", lambda: release)
    monkeypatch.setattr(fla.importlib, "import_module", fail)
    for name in (GATED_DELTA_RULE, KDA, CONVOLUTION):
        assert fla._imported.__wrapped__(name) is None
    assert said in caplog.text and len(caplog.records) == (3 if said else 0)


def test_the_function_is_found_where_the_release_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "_release", lambda: "0.5.2")
    files = {
        "fla.modules.convolution": SimpleNamespace(causal_conv1d="it"),
        "fla.ops.kda": SimpleNamespace(chunk_kda="it"),
    }
    monkeypatch.setattr(fla.importlib, "import_module", files.__getitem__)
    assert fla._imported.__wrapped__(CONVOLUTION) == fla._imported.__wrapped__(KDA) == "it"


def test_the_way_that_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan_of(star(40, 30, 3))
    assert delta_rule_way(KDA, None, chosen).name == TORCH_SCAN
    assert delta_rule_way(KDA, Kernel(reference.kda), chosen).name == FLA_RESCAN
    assert not is_rescan_cheaper(plan_of(star(0, 30, 3)))  # one call either way
    assert not is_rescan_cheaper(plan_of(star(40, 1, 9)))  # more than four times the row
    monkeypatch.setattr(choice, "LEVEL_TOKENS", 80)
    assert delta_rule_way(KDA, Kernel(reference.kda), chosen).name == FLA_LEVELS
    assert is_rescan_cheaper(plan_of(star(39, 30, 3)))


@pytest.mark.parametrize("kernel", [None, "kernel"])
@rules
def test_every_way_gives_the_same(rule: str, kernel: str | None) -> None:
    plan = plan_of(star(5, 3, 2), [4])
    inputs = delta_rule_inputs(rule == KDA, len(plan))
    way = delta_rule_way(rule, Kernel(_RULES[rule]) if kernel else None, plan)
    expected = outcome(_specified(rule, plan), inputs, torch.float64)
    found = outcome(lambda *x: way.run(Inputs(*x[:5]), plan, x[5], True), inputs, torch.float64)
    assert error(found, expected) < _EXACT
