"""FLA's kernels are tried before they are trusted; with stand-ins for these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dta_plugin.recurrent import fla_check
from dta_plugin.recurrent.delta_rule import tree_gated_delta_rule, tree_kda
from dta_plugin.recurrent.fla import CONVOLUTION, GATED_DELTA_RULE, KDA
from dta_plugin.recurrent.fla_check import kernel_problem, trusted_kernel
from tests.recurrent.kernels import Kernel, convolution

_GOOD: dict[str, Any] = {
    GATED_DELTA_RULE: Kernel(tree_gated_delta_rule),
    KDA: Kernel(tree_kda),
    CONVOLUTION: lambda *x: (convolution(*x)[0].to(x[0].dtype), None),
}


def _problem(name: str, kernel: Callable[..., Any], dtype: torch.dtype = torch.bfloat16) -> str | None:
    return kernel_problem(kernel, name, torch.device("cpu"), dtype, () if name == CONVOLUTION else (16, 16))


@pytest.mark.parametrize("name", list(_GOOD))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_right_passes(name: str, dtype: torch.dtype) -> None:
    assert _problem(name, _GOOD[name], dtype) is None


def _cut(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same, with gradients of zero."""
    return None if x is None else x.detach() + 0 * x


def _without_state(*x: torch.Tensor, initial_state: torch.Tensor | None = None, **more: Any) -> Any:
    return _GOOD[KDA](*x, initial_state=None if initial_state is None else 0 * initial_state, **more)


def _without_gradient_of_states(*x: torch.Tensor, initial_state: torch.Tensor | None = None, **more: Any) -> Any:
    return _GOOD[KDA](*x, initial_state=_cut(initial_state), **more)


def _without_gradient_of_final_states(*x: torch.Tensor, **more: Any) -> Any:
    out, states = _GOOD[KDA](*x, **more)
    return out, _cut(states)


def _nan(*x: torch.Tensor, **more: Any) -> Any:
    out, states = _GOOD[KDA](*x, **more)
    return out * torch.nan, states


def _broken(*_: torch.Tensor, **__: Any) -> Any:
    raise NotImplementedError("no such instruction")


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (_without_state, "differs from torch's functions by"),
        (_without_gradient_of_states, "differs from torch's functions by"),
        (_without_gradient_of_final_states, "differs from torch's functions by"),
        (_nan, "differs from torch's functions by inf"),
        (_broken, "fails with NotImplementedError: no such instruction"),
    ],
)
def test_what_is_wrong_is_found(kernel: Callable[..., Any], expected: str) -> None:
    assert expected in (_problem(KDA, kernel) or "")


def test_one_warning_and_torch_instead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fla_check, "serving_kernel", lambda *_: _broken)
    fla_check._is_refused.cache_clear()
    with torch.no_grad():
        for _ in range(2):
            assert trusted_kernel(KDA, torch.device("cpu"), torch.bfloat16, 16, 16) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "torch's functions are used" in caplog.text
    monkeypatch.setattr(fla_check, "serving_kernel", lambda *_: _GOOD[KDA])
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(_broken, _broken):
        assert trusted_kernel(KDA, torch.device("cpu"), torch.bfloat16, 16, 16) is _GOOD[KDA]


def test_no_check_within_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_check, "serving_kernel", lambda *_: _broken)
    monkeypatch.setattr(fla_check, "_is_refused", _broken)
    found = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: found.append(trusted_kernel(KDA, torch.device("cpu"), torch.bfloat16, 16, 16)))
    x.sum().backward()
    assert found == [_broken]
