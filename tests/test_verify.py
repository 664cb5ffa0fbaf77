"""The comparison that a user can switch on: silent on a good model, loud on a wrong mask."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.errors import VerificationError
from dta_plugin.verify import compare
from tests.support.models import FAMILIES, VOCABULARY, tiny_model
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import make_siblings_visible
from tests.support.trees import branching_comb, star

SEQUENCES = branching_comb(4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_good_model_passes(family: str, dtype: torch.dtype) -> None:
    out = dta_plugin.sequence_logprobs(tiny_model(family, dtype), SEQUENCES, TreeConfig(verify="first"))
    assert out.report.executor == "packed"
    torch.cat(out.logprobs).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype) -> None:
    make_siblings_visible(monkeypatch)
    model = tiny_model(family, dtype)
    with pytest.raises(
        VerificationError,
        match=r"differ from layer 0 on, by .* nats on average.*report the model.*run without the tree",
    ):
        dta_plugin.sequence_logprobs(model, star(12), TreeConfig(verify="first", probe="off"))


def test_calls_are_counted_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[torch.nn.Module] = []
    monkeypatch.setattr("dta_plugin.api.check_batch", lambda model, *_: verified.append(model))
    for verify, expected in (("every:2", 3), ("first", 1), ("off", 0)):
        for model in (tiny_model("llama"), tiny_model("llama")):
            for _ in range(5):
                dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(verify=verify))
            assert verified == [model] * expected
            verified.clear()


def test_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dta_plugin.execution.probing.tree_difference._flat", lambda result: torch.cat(result.logprobs) * float("nan")
    )
    with pytest.raises(VerificationError):
        dta_plugin.sequence_logprobs(tiny_model("llama"), SEQUENCES, TreeConfig(verify="every:1"))


def test_verification_leaves_model_and_gradients_alone() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    compare(model, SEQUENCES)
    dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(verify="first"))
    assert [model.training, model.model.layers[0].training, model.model.layers[1].training] == [True, False, True]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert model.model.embed_tokens.weight.grad is None


def test_compare_measures_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3", torch.float64)
    good = compare(model, SEQUENCES, temperature=0.7)
    assert good.logprobs.most < 1e-6 and good.worst_gradient[1] < 1e-6
    assert set(good.gradients) == {name for name, _ in model.named_parameters()}
    make_siblings_visible(monkeypatch)
    bad = compare(model, SEQUENCES, temperature=0.7)
    assert bad.logprobs.mean > 1e-2 and bad.worst_gradient[1] > 1e-2


def test_compare_of_frozen_parameters_and_nothing_scored() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in compare(model, SEQUENCES).gradients
    nothing = compare(model, SEQUENCES, scored=[len(s) for s in SEQUENCES])
    assert (nothing.logprobs.most, nothing.worst_gradient[1]) == (0.0, 0.0)


@pytest.mark.skipif(Version(version("transformers")) < Version("5.15"), reason="mixers ask caches differently")
def test_sums_of_decays_along_chunks_are_rounding() -> None:
    """transformers' delta rule sums logarithms of decays over 64 tokens: where decays are large, their gradients lose
    four digits.
    """
    model = random_causal_lm(config_of("qwen3_5_text", vocab_size=VOCABULARY))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(math.log(12.0))
    found = compare(model, star(6, prefix=280, branch=5))
    assert found.worst_gradient[1] > 5e-5 and not found.wrong_gradients
