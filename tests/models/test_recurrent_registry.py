"""The dispatchers in front of recurrent layers: invisible without a tree, never bypassed unnoticed with one."""

from __future__ import annotations

import copy
import gc
import pickle
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch import nn

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.models import dispatch, recurrent_registry
from dta_plugin.models.recurrent_layers import Functions, Nodes, mixers, way
from dta_plugin.models.stand_in import StandIn
from tests.support.oracle import dense, difference, gradients, result_of
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import through_tree

pytestmark = [
    pytest.mark.usefixtures("unprobed"),
    pytest.mark.skipif(Version(version("transformers")) < Version("5.15"), reason="mixers ask caches differently"),
]


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1", "kimi_linear"])
def test_bit_identical_without_a_tree(family: str) -> None:
    model = random_causal_lm(config_of(family))
    ids = torch.randint(3, 90, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = []
    for _ in range(2):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        results.append((logits.detach(), gradients(model.train(), logits.sin().sum()), found))
        dispatch.install(model)
    (a, grads_a, tokens_a), (b, grads_b, tokens_b) = results
    assert torch.equal(a, b) and torch.equal(tokens_a, tokens_b)
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


def test_what_stood_there_comes_back() -> None:
    dispatch.uninstall()
    gc.collect()  # trees of other tests
    model = random_causal_lm(config_of("qwen3_5_text"))
    (mixer, *_), layer = mixers(model), model.model.layers[0]
    own = type(mixer).forward, type(layer).forward, way(mixer)
    dispatch.install(model)
    assert isinstance(type(mixer).forward, StandIn) and isinstance(type(layer).forward, StandIn)
    dispatch.uninstall(model)
    assert (type(mixer).forward, type(layer).forward) == own[:2]
    assert isinstance(own[2], Functions) and not any(isinstance(own[2].place[n], StandIn) for n in own[2].names)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba"])
def test_layers_that_are_recomputed_have_the_tree_again(family: str, reentrant: bool) -> None:
    """Also if nobody needs the dispatchers any more when the backward pass comes."""
    expected = dense(random_causal_lm(config_of(family)), forest())
    model = random_causal_lm(config_of(family)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"), return_entropy=True)
    dispatch.uninstall(model)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= 1e-4


@pytest.mark.parametrize("budget", [3, 16])
def test_checkpointing_within_chunks(budget: int) -> None:
    expected = dense(random_causal_lm(config_of("bamba")), forest())
    model = random_causal_lm(config_of("bamba")).train()
    model.gradient_checkpointing_enable()
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=budget)
    assert difference(through_tree(model, forest(), config=config, executor="streamed"), expected).worst <= 2e-5


def test_a_layer_that_goes_past_the_tree_is_an_error() -> None:
    model = random_causal_lm(config_of("lfm2"))
    (mixer, *_) = mixers(model)
    mixer.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(UnsupportedError, match=r"Recurrent layer\(s\) \[0\] of Lfm2ForCausalLM did not use the tree"):
        dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"))


def test_a_function_that_is_not_called_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_causal_lm(config_of("lfm2"))
    (mixer, *_) = mixers(model)
    own = way(mixer)
    assert isinstance(own, Functions)
    lost = Functions(own.place, (*own.names, "mamba2_chunk_scan"))
    monkeypatch.setattr(recurrent_registry, "way", lambda _: lost)
    with pytest.raises(UnsupportedError, match="did not call mamba2_chunk_scan, by which it carries its state"):
        dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "kimi_linear", "bamba"])
@pytest.mark.parametrize("budget", [None, 11])
def test_node_after_node(family: str, budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of mixers whose functions are not known."""
    expected, model = dense(random_causal_lm(config_of(family)), forest()), random_causal_lm(config_of(family))
    monkeypatch.setattr(recurrent_registry, "way", lambda _: Nodes("cache"))
    executor = "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    assert difference(through_tree(model, forest(), config=config, executor=executor), expected).worst <= 1e-4


def test_models_are_copied_and_pickled_as_ever() -> None:
    model = random_causal_lm(config_of("lfm2"))
    dispatch.install(model)
    again: nn.Module = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [name for name, _ in again.named_modules()] == [name for name, _ in model.named_modules()]
