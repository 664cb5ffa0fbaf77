"""Whole models whose recurrent layers run on FLA's kernels, with stand-ins for these; and what the report says."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.models import recurrent_functions
from dta_plugin.recurrent import choice
from dta_plugin.recurrent.fla import CONVOLUTION, GATED_DELTA_RULE, KDA
from tests.recurrent import reference
from tests.recurrent.kernels import Kernel, convolution
from tests.support.oracle import dense, difference, result_of
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm

pytestmark = [
    pytest.mark.usefixtures("unprobed"),
    pytest.mark.skipif(Version(version("transformers")) < Version("5.15"), reason="mixers ask caches differently"),
]

_KERNELS = {
    CONVOLUTION: convolution,
    GATED_DELTA_RULE: Kernel(reference.gated_delta_rule),
    KDA: Kernel(reference.kda),
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FLA serves here. -> what it was asked for."""
    asked: list[str] = []

    def kernel(name: str, *_: object) -> Callable[..., object]:
        asked.append(name)
        return _KERNELS[name]

    monkeypatch.setattr(recurrent_functions, "trusted_kernel", kernel)
    return asked


@pytest.mark.parametrize("budget", [None, 16])
@pytest.mark.parametrize("way", ["levels", "rescan"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear"])
def test_models_equal_dense(
    family: str, way: str, budget: int | None, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, model = dense(random_causal_lm(config_of(family)), forest()), random_causal_lm(config_of(family))
    monkeypatch.setattr(choice, "LEVEL_TOKENS", 0 if way == "levels" else 1 << 20)
    executor = "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    out = dta_plugin.sequence_logprobs(model, forest(), config, return_entropy=True)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= 1e-4
    assert set(served) == {CONVOLUTION, KDA if family == "kimi_linear" else GATED_DELTA_RULE}
    assert out.report.executor == executor and f"fla {way}" in out.report.backend.split("+")


def test_checkpointed_layers_rescan_again(served: list[str]) -> None:
    expected = dense(random_causal_lm(config_of("qwen3_5_text")), forest())
    model = random_causal_lm(config_of("qwen3_5_text")).train()
    model.gradient_checkpointing_enable()
    out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"), return_entropy=True)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= 1e-4
    assert out.report.backend == "cpu+fla convolution+fla rescan"


def test_a_state_that_is_not_handed_on_is_noticed(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dense(random_causal_lm(config_of("qwen3_5_text")), forest())
    model = random_causal_lm(config_of("qwen3_5_text"))
    monkeypatch.setattr(choice, "LEVEL_TOKENS", 0)
    rule = _KERNELS[GATED_DELTA_RULE]
    forgetful = {**_KERNELS, GATED_DELTA_RULE: lambda *x, initial_state, **more: rule(*x, **more)}
    monkeypatch.setattr(recurrent_functions, "trusted_kernel", lambda name, *_: forgetful[name])
    out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"), return_entropy=True)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst > 1e-3


def test_kernels_are_for_those_who_want_triton(served: list[str]) -> None:
    model = random_causal_lm(config_of("qwen3_5_text"))
    out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed", backend="reference"))
    assert not served and out.report.backend == "reference+torch scan"


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("qwen3_5_text", "cpu+torch scan"),
        ("kimi_linear", "cpu+torch scan"),
        ("falcon_h1", "cpu+torch scan"),
        ("jamba", "torch scan"),
        ("lfm2", "cpu"),
        ("llama", "cpu"),
    ],
)
def test_what_the_report_says_without_kernels(family: str, backend: str) -> None:
    out = dta_plugin.sequence_logprobs(random_causal_lm(config_of(family)), forest(), TreeConfig(executor="packed"))
    assert out.report.backend == backend and torch.cat([*out.logprobs]).isfinite().all()
