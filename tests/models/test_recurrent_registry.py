"""The dispatchers in front of recurrent layers: invisible without a tree, never bypassed unnoticed with one."""

from __future__ import annotations

import copy
import pickle
from importlib.metadata import version
from typing import Any
from weakref import WeakSet

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import dta_plugin
from dta_plugin import TreeConfig, TreeMask, UnsupportedError
from dta_plugin.execution.streaming.gradient_sums import GradientSums
from dta_plugin.models import dispatch, recurrent_registry
from dta_plugin.models.layers import attention_modules
from dta_plugin.models.recurrent_layers import Functions, Nodes, mixers, way
from dta_plugin.models.sizes import attention_sizes
from dta_plugin.models.stand_in import StandIn
from tests.support.oracle import dense, difference, functional, gradients, result_of
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


def test_what_stood_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeMask, "alive", WeakSet())  # without those of other tests
    dispatch.uninstall()
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


def test_a_class_that_extends_a_mixers_forward() -> None:
    """Also after a model of the parent class was run."""

    class Own(Qwen3_5GatedDeltaNet):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = super().forward(*args, **kwargs)
            return 2 * out

    def model() -> PreTrainedModel:
        made = random_causal_lm(config_of("qwen3_5_text"))
        for mixer in mixers(made):
            mixer.__class__ = Own
        return made

    expected = dense(model(), forest())
    dispatch.install(random_causal_lm(config_of("qwen3_5_text")))
    assert difference(through_tree(model(), forest()), expected).worst <= 1e-4


def test_models_without_a_tree_within_a_mixers_call() -> None:
    """Such as a hook that asks another model of the family."""
    model, other = (random_causal_lm(config_of("lfm2")) for _ in range(2))
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = dense(random_causal_lm(config_of("lfm2")), forest())
    own = other(input_ids=ids, use_cache=False).logits
    (mixer, *_) = mixers(model)
    mixer.register_forward_pre_hook(lambda *_: answers.append(other(input_ids=ids, use_cache=False).logits))
    answers: list[torch.Tensor] = []
    assert difference(through_tree(model, forest()), expected).worst <= 1e-5
    assert answers and torch.equal(answers[0], own)


@pytest.mark.parametrize(
    "family,trained",
    [("mamba2", "dt_bias"), ("jamba", "dt_proj.bias"), ("bamba", "A_log"), ("qwen3_5_text", "in_proj_a.weight")],
)
def test_states_hand_gradients_on_whatever_is_trained(family: str, trained: str) -> None:
    """One parameter of the first mixer, and inputs that require gradients, as PEFT has them under checkpointing."""

    def model() -> PreTrainedModel:
        made = random_causal_lm(config_of(family)).train()
        (mixer, *_) = mixers(made)
        for name, parameter in made.named_parameters():
            parameter.requires_grad = name.endswith(trained) and any(parameter is own for own in mixer.parameters())
        made.enable_input_require_grads()
        return made

    expected = dense(model(), forest())
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=5)
    assert difference(through_tree(model(), forest(), config=config, executor="streamed"), expected).worst <= 2e-4


def test_a_streamed_backward_pass_that_broke_off_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dense(random_causal_lm(config_of("lfm2")), forest())
    model = random_causal_lm(config_of("lfm2"))
    out = dta_plugin.sequence_logprobs(
        model, forest(), TreeConfig(executor="streamed", max_tree_tokens_per_chunk=5), return_entropy=True
    )
    own, calls = GradientSums.add, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("in between")
        own(*args)

    monkeypatch.setattr(GradientSums, "add", failing)
    with pytest.raises(RuntimeError, match="in between"):
        functional(out.logprobs, out.entropies).backward(retain_graph=True)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= 1e-5


def test_attention_that_layers_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zamba 2's says that it is in layer -1, wherever it is called."""
    model = random_causal_lm(config_of("zamba2"))
    assert len(attention_sizes(model)) == model.config.layer_types.count("hybrid")
    shared = attention_modules(model)[-1]
    monkeypatch.setattr(shared, "forward", lambda hidden_states, *_, **__: (hidden_states[..., :32], None))
    with pytest.raises(UnsupportedError, match=r"Attention layer\(s\) \[-1\] of Zamba2ForCausalLM did not"):
        dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"))
