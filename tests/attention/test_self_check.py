"""The self-check at first use: what it catches, what it says, and that it leaves no trace in what it runs amid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dta_plugin import InvalidInputError, PrefixTree, TreeMask, tree_attention
from dta_plugin.attention import api, self_check, tiles, triton_backend
from dta_plugin.attention.self_check import Kind
from dta_plugin.attention.triton_table import Launch, Launches
from tests.support.attention_variants import Inputs, Options, mask_of
from tests.support.interpreter import DEVICE, ON_GPU
from tests.support.trees import star

PLAIN = Kind(DEVICE, torch.float32, (16, 16), 2)
KINDS = [
    PLAIN,
    Kind(DEVICE, torch.bfloat16, (64, 64), 4),
    Kind(DEVICE, torch.float16, (32, 48), 1, window=True, softcap=True, sinks=True),
]


@pytest.fixture
def small_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree.from_sequences(star(2, prefix=70, branch=20))
    monkeypatch.setattr(self_check, "_tree", lambda: tree)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, on a device that the kernels serve."""
    monkeypatch.setattr(self_check, "_outcomes", {})
    if not ON_GPU:
        size = Launch(64, 64, 4, 2)  # few tiles: Triton's interpreter takes a while for each
        monkeypatch.setattr(triton_backend, "launches", lambda *_: Launches(size, size, size))
        monkeypatch.setattr(api, "triton_obstacle", lambda *_: None)
        monkeypatch.setattr(api, "resolve_backend", lambda *_: "triton")
    yield


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sound_kernels_pass(kind: Kind) -> None:
    outcome = self_check.self_check(kind)
    assert outcome.problem is None and 0 < outcome.error <= outcome.allowed < 0.1
    assert outcome.as_dict()["dtype"] in str(kind)


def visits_without_mask(patch: pytest.MonkeyPatch) -> None:
    def all_full(*arguments: np.ndarray | int) -> tiles.Visits:
        found = tiles.visits(*arguments)  # type: ignore[arg-type]
        return replace(found, masked=found.start[1:].clone())

    patch.setattr(triton_backend, "visits", all_full)


def a_partial_sum_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def one_short(*arguments: tiles.Visits | int) -> tiles.KeyWork:
        work = tiles.key_work(*arguments)  # type: ignore[arg-type]
        start = work.split_start.clone()
        start[-1] -= 1
        return replace(work, split_start=start)

    patch.setattr(triton_backend, "key_work", one_short)


def arguments_are_wrong(patch: pytest.MonkeyPatch, wrong: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    right = triton_backend.TritonKernels._arguments

    def changed(self: triton_backend.TritonKernels, *inputs: Any) -> dict[str, Any]:
        arguments = right(self, *inputs)
        return arguments | wrong(arguments)

    patch.setattr(triton_backend.TritonKernels, "_arguments", changed)


def the_scale_is_wrong(patch: pytest.MonkeyPatch) -> None:
    arguments_are_wrong(patch, lambda right: {"scale": right["scale"] * 1.05})


def the_window_is_one_short(patch: pytest.MonkeyPatch) -> None:
    arguments_are_wrong(patch, lambda right: {"window": right["window"] - 1})


def the_compiler_fails(patch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("PassManager::run failed")

    patch.setattr(triton_backend.TritonKernels, "_query_gradient", fails)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Kind, str]] = {
    "visits_without_mask": (visits_without_mask, PLAIN, "differ from the reference"),
    "a_partial_sum_is_dropped": (a_partial_sum_is_dropped, replace(PLAIN, groups=8), "differ from the reference"),
    "the_scale_is_wrong": (the_scale_is_wrong, replace(PLAIN, dtype=torch.bfloat16), "differ from the reference"),
    "the_window_is_one_short": (the_window_is_one_short, replace(PLAIN, window=True), "differ from the reference"),
    "the_compiler_fails": (the_compiler_fails, PLAIN, "fail with RuntimeError: PassManager::run failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, kind, said = FAULTS[fault]
    plant(monkeypatch)
    outcome = self_check.self_check(kind)
    assert outcome.problem is not None and said in outcome.problem and str(kind) in outcome.problem


def attend(mask: TreeMask, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
    x = Inputs(Options(head_dim=16, value_dim=16), len(mask), dtype, DEVICE).leaves
    return tree_attention(*(x[name].requires_grad_(requires_grad) for name in "qkv"), mask)


def test_a_mismatch_is_one_warning_and_another_backend(
    small_tree: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sound = attend(mask_of(star(4), device=DEVICE))
    self_check._outcomes.clear()
    visits_without_mask(monkeypatch)
    for _batch in range(3):
        mask = mask_of(star(4), device=DEVICE)
        for _layer in range(2):
            torch.testing.assert_close(attend(mask), sound, rtol=1e-5, atol=1e-5)
        assert mask.backends_used == {"flex"}
    (record,) = (record for record in caplog.records if record.name == "dta_plugin")
    assert "differ from the reference" in record.message and "FlexAttention is used instead" in record.message
    with pytest.raises(InvalidInputError, match="backend='triton', but the Triton kernels differ"):
        attend(mask_of(star(4), "triton", DEVICE))


def test_sound_kernels_are_used_and_checked_once(small_tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    check = self_check._check
    monkeypatch.setattr(self_check, "_check", lambda kind: checks.append(kind) or check(kind))
    for _batch in range(2):
        mask = mask_of(star(4), device=DEVICE)
        attend(mask)
        assert mask.backends_used == {"triton"}
    assert checks == [PLAIN]
    attend(mask_of(star(4), device=DEVICE), torch.bfloat16)
    assert checks == [PLAIN, replace(PLAIN, dtype=torch.bfloat16)]


def test_memory_that_runs_out_decides_nothing(small_tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(triton_backend.TritonKernels, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            self_check.self_check(PLAIN)
    assert self_check.self_check(PLAIN).problem is None


def test_it_waits_for_a_call_that_is_neither_traced_nor_captured(
    small_tree: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits_without_mask(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert self_check.trusted_backend("auto", PLAIN) == "triton"
    assert self_check.trusted_backend("auto", PLAIN) == "flex"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_leaves_no_trace(small_tree: None, use_reentrant: bool) -> None:
    """Amid checkpointing, autocast, other hooks and modes: the same gradients and random numbers as without a check."""

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        mask = mask_of(star(4), device=DEVICE)
        x = Inputs(Options(head_dim=16, value_dim=16), len(mask), torch.float32, DEVICE).leaves
        leaves = [x[name].requires_grad_() for name in "qkv"]
        saved: list[torch.Tensor] = []

        def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x * 2 for x in (q, k, v))
            return tree_attention(q, k, v, mask) * torch.rand(1, device=DEVICE)

        with (
            torch.autocast(DEVICE.type, torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            out = checkpoint(layer, *leaves, use_reentrant=use_reentrant)
        grads = torch.autograd.grad(out.sum(), leaves) if not use_reentrant else _backward(out, leaves)
        return out.detach(), *grads, torch.rand(3), torch.tensor(len(saved))

    first, second = run(), run()
    assert PLAIN in self_check._outcomes
    for actual, expected in zip(first, second, strict=True):
        assert torch.equal(actual, expected)


def _backward(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out.sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_there_are_no_gradients(small_tree: None, context: Callable[[], torch.no_grad]) -> None:
    with context():
        attend(mask_of(star(4), device=DEVICE))
    assert self_check._outcomes[PLAIN].problem is None


def test_deterministic_algorithms_stay_on(small_tree: None) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert self_check.self_check(PLAIN).problem is None
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
