"""The fused LM head against log_softmax of written-out logits: values, and gradients of hidden, weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin.models import tiled_logprobs as logprobs
from dta_plugin.models.lm_head import LMHead, edge_logprobs

HIDDEN, VOCABULARY = 16, 53
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One LM-head call; `edges` may name a row several times or never."""

    rows: int = 9
    edges: tuple[int, ...] = (0, 1, 1, 1, 2, 3, 4, 5, 8, 8, 7)
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    entropy: bool = True
    frozen: bool = False


CASES: dict[str, Case] = {
    "plain": Case(),
    "no_entropy": Case(entropy=False),
    "bias": Case(bias=True),
    "temperature": Case(temperature=0.6),
    "scale": Case(scale=0.3),
    "softcap": Case(softcap=1.5),
    "everything": Case(temperature=1.7, scale=0.5, softcap=2.0, bias=True),
    "frozen_weight": Case(frozen=True, bias=True),
    "one_row_many_edges": Case(rows=1, edges=(0,) * 40),
    "no_edges": Case(rows=3, edges=()),
    "no_rows": Case(rows=0, edges=()),
}


class Problem:
    """Inputs of a case, the same numbers for every dtype."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.row_of_edge = torch.tensor(case.edges, dtype=torch.int64)
        self.hidden = torch.randn(case.rows, HIDDEN, generator=generator).bfloat16().to(dtype).requires_grad_()
        self.linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=case.bias, dtype=dtype)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16() / 2)
        self.linear.requires_grad_(not case.frozen)
        self.targets = torch.randint(VOCABULARY, (len(case.edges),), generator=generator)
        self.edge_weight = torch.randn(len(case.edges), generator=generator, dtype=torch.float64)
        self.row_weight = torch.randn(case.rows, generator=generator, dtype=torch.float64)

    def fused(self, module: torch.nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = LMHead(module or self.linear, self.case.scale, self.case.softcap)
        return edge_logprobs(
            self.hidden, head, self.targets, self.row_of_edge, self.case.temperature, self.case.entropy
        )

    def naive(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.linear(self.hidden) * self.case.scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.case.softcap is not None:
            logits = self.case.softcap * torch.tanh(logits / self.case.softcap)
        log_p = (logits / self.case.temperature).log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        return log_p[self.row_of_edge, self.targets], entropy if self.case.entropy else None

    def loss(self, logp: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        total = (self.edge_weight * torch.tanh(logp.double() / 4)).sum()
        return total if entropy is None else total + (self.row_weight * entropy.double() ** 2).sum()

    def outputs(self, logp: torch.Tensor, entropy: torch.Tensor | None) -> Outputs:
        leaves = {"hidden": self.hidden}
        if not self.case.frozen:
            leaves |= dict(self.linear.named_parameters())
        grads = torch.autograd.grad(self.loss(logp, entropy), list(leaves.values()))
        found = {"logp": logp.detach()} | dict(zip(leaves, grads, strict=True))
        return found if entropy is None else found | {"entropy": entropy.detach()}


def assert_close(actual: Outputs, expected: Outputs, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        apart = (actual[name].double() - value.double()).norm().item()
        assert apart <= tolerance * max(1.0, value.double().norm().item()), name


@pytest.fixture(params=["one tile", "tiles", "tiles recomputed"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one tile":
        monkeypatch.setattr(logprobs, "_TILE_ROWS", 4)
        monkeypatch.setattr(logprobs, "_TILE_VOCAB", 10)
    if request.param == "tiles recomputed":
        monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_log_softmax(tiles: None, name: str, dtype: torch.dtype, tolerance: float) -> None:
    problem = Problem(CASES[name], dtype)
    assert_close(problem.outputs(*problem.fused()), problem.outputs(*problem.naive()), tolerance)


class Wrapped(torch.nn.Module):
    """Not a plain Linear, like a LoRA layer or a quantised head."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile_rows", [4, 1024])
def test_module_path(monkeypatch: pytest.MonkeyPatch, name: str, tile_rows: int) -> None:
    monkeypatch.setattr(logprobs, "_TILE_ROWS", tile_rows)
    problem = Problem(CASES[name], torch.float64)
    assert_close(problem.outputs(*problem.fused(Wrapped(problem.linear))), problem.outputs(*problem.naive()), 1e-12)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hooked_head_goes_through_its_module(hook: str) -> None:
    problem = Problem(Case(), torch.float64)
    plain = problem.fused()[0]
    double = {"register_forward_hook": lambda _, inputs, logits: 2 * logits}.get(hook, lambda _, inputs: 2 * inputs[0])
    with getattr(problem.linear, hook)(double):
        hooked = problem.fused()[0]
        assert torch.allclose(hooked, problem.naive()[0], rtol=0, atol=1e-12)
    assert not torch.allclose(hooked, plain)


@given(
    edges=st.lists(st.integers(0, 6), max_size=20),
    tile_rows=st.integers(1, 8),
    tile_vocab=st.integers(1, 60),
    temperature=st.floats(0.3, 3.0),
    softcap=st.sampled_from([None, 2.0]),
)
def test_any_tiling(
    edges: list[int], tile_rows: int, tile_vocab: int, temperature: float, softcap: float | None
) -> None:
    problem = Problem(Case(7, tuple(edges), temperature, 1.0, softcap, bias=True), torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_TILE_ROWS", tile_rows)
        patch.setattr(logprobs, "_TILE_VOCAB", tile_vocab)
        assert_close(problem.outputs(*problem.fused()), problem.outputs(*problem.naive()), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_naive(tiles: None, dtype: torch.dtype) -> None:
    exact, half = Problem(Case(bias=True), torch.float64), Problem(Case(bias=True), dtype)
    truth = exact.outputs(*exact.naive())
    fused, naive = half.outputs(*half.fused()), half.outputs(*half.naive())
    for name, value in truth.items():
        assert fused[name].dtype == naive[name].dtype, name
        allowed = (naive[name].double() - value).norm()  # times 1.5: either error is one draw of rounding noise
        assert (fused[name].double() - value).norm() <= 1.5 * allowed, name


def test_fan_out_600_keeps_small_gradients_in_bfloat16() -> None:
    """600 equal gradients of one edge: a bfloat16 sum would stall near 256."""
    problem = Problem(Case(rows=1, edges=(0,) * 600, entropy=False), torch.bfloat16)
    problem.targets[:] = 7
    logp, _ = problem.fused()
    single = Problem(Case(rows=1, edges=(0,), entropy=False), torch.bfloat16)
    single.targets[:] = 7
    (many,) = torch.autograd.grad(logp.sum(), problem.hidden)
    (one,) = torch.autograd.grad(single.fused()[0].sum(), single.hidden)
    assert many.norm().item() == pytest.approx(600 * one.norm().item(), rel=0.01)


def test_a_second_backward_pass_gives_the_same(tiles: None) -> None:
    problem = Problem(Case(bias=True), torch.float64)
    loss = problem.loss(*problem.fused())
    leaves = [problem.hidden, *problem.linear.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("use", [lambda p, h: p.sum(), lambda p, h: h.sum()], ids=["logprobs", "entropies"])
def test_gradient_of_one_output_only(use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    problem = Problem(Case(), torch.float64)
    (actual,) = torch.autograd.grad(use(*problem.fused()), problem.hidden)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(use(*problem.naive()), problem.hidden)  # type: ignore[arg-type]
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def test_a_derivative_of_the_gradient_is_refused() -> None:
    problem = Problem(Case(), torch.float64)
    (grad,) = torch.autograd.grad(problem.loss(*problem.fused()), problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_head_dtype_of_the_projection() -> None:
    """dtype=float32 projects bfloat16 hidden states in float32; gradients come back in the parameters' dtype."""
    problem = Problem(Case(bias=True), torch.bfloat16)
    head = LMHead(problem.linear, dtype=torch.float32)
    logp, _ = edge_logprobs(problem.hidden, head, problem.targets, problem.row_of_edge)
    wide = Problem(Case(bias=True), torch.float32)
    assert torch.allclose(logp, wide.naive()[0], rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(logp.sum(), problem.linear.weight)
    assert grad.dtype is torch.bfloat16


def test_autocast_projects_in_its_dtype() -> None:
    problem, half = Problem(Case(bias=True), torch.float32), Problem(Case(bias=True), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = problem.fused()
    assert torch.equal(logp, half.fused()[0])


def test_negative_control_wrong_row() -> None:
    problem = Problem(Case(), torch.float64)
    expected = problem.outputs(*problem.naive())
    problem.row_of_edge = problem.row_of_edge.roll(1)
    with pytest.raises(AssertionError):
        assert_close(problem.outputs(*problem.fused()), expected, 1e-3)
