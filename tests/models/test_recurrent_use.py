"""Recurrent layers on trees in what users do with models: subclasses, adapters, frozen parts, low precision, caches."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.models.recurrent_layers import mixers
from tests.support.oracle import dense, difference, gradient_error, gradients, result_of
from tests.support.sweep import doctor_says, forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import through_tree
from tests.support.widened import widened

pytestmark = [
    pytest.mark.usefixtures("unprobed"),
    pytest.mark.skipif(Version(version("transformers")) < Version("5.15"), reason="mixers ask caches differently"),
]
PACKED = TreeConfig(executor="packed")
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
EXACT = 1e-10


def check(model: nn.Module) -> None:
    """Packed and streamed, in float64."""
    model.double()
    with widened():
        expected = dense(model, forest())
        for config, executor in ((PACKED, "packed"), (STREAMED, "streamed")):
            found = difference(through_tree(model, forest(), config=config, executor=executor), expected)
            assert found.worst <= EXACT, (executor, found)


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    return random_causal_lm(config_of(family), seed)


@pytest.mark.parametrize("had_a_tree_before", [False, True])
def test_a_class_of_the_users_that_extends_a_mixers_forward(had_a_tree_before: bool) -> None:
    """Its parent's forward may have a dispatcher, too."""
    model, calls = model_of("lfm2"), []
    if had_a_tree_before:
        dta_plugin.sequence_logprobs(model, forest(), PACKED)
    found = list(mixers(model))
    parent = type(found[0])

    class Counting(parent):  # type: ignore[misc, valid-type]
        def forward(self, *args: object, **kwargs: object) -> object:
            calls.append(self)
            return super().forward(*args, **kwargs)

    for mixer in found:
        mixer.__class__ = Counting
    check(model)
    assert set(calls) == set(found)


def test_a_class_of_the_users_with_a_forward_of_its_own_is_refused() -> None:
    model = model_of("lfm2")
    for mixer in mixers(model):

        class Sums(type(mixer)):  # type: ignore[misc]
            def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
                return hidden_states.cumsum(1)

        mixer.__class__ = Sums
    with pytest.raises(UnsupportedError, match="Sums carries its state by functions that are not known"):
        dta_plugin.sequence_logprobs(model, forest(), PACKED)


@pytest.mark.parametrize("family", ["qwen3_5_text", "jamba"])
@pytest.mark.parametrize("trained", ["one mixer", "all but mixers", "convolutions"])
def test_frozen_parts(family: str, trained: str) -> None:
    model = model_of(family)
    own = {parameter for mixer in mixers(model) for parameter in mixer.parameters()}
    last = set(list(mixers(model))[-1].parameters())
    for name, parameter in model.named_parameters():
        asked = {"one mixer": parameter in last, "all but mixers": parameter not in own, "convolutions": "conv" in name}
        parameter.requires_grad_(asked[trained])
    check(model)


def test_adapters_on_the_projections_of_mixers() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["in_proj_qkv", "in_proj_a", "out_proj"], init_lora_weights=False)
    check(peft.get_peft_model(model_of("qwen3_5_text"), config))


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("family", ["lfm2", "bamba"])
def test_half_precision_is_as_near_to_the_truth_as_the_unmodified_model(family: str, is_autocast: bool) -> None:
    model = model_of(family).bfloat16()
    wide = copy.deepcopy(model).float()
    truth = dense(wide, forest())
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        rounded = wide if is_autocast else model
        noise = dense(rounded, forest())
        for config, executor in ((PACKED, "packed"), (STREAMED, "streamed")):
            found = through_tree(rounded, forest(), config=config, executor=executor)
            assert gradient_error(found, truth) <= 1.5 * gradient_error(noise, truth), executor


def test_another_model_of_the_class_stays_as_it_is_while_graphs_of_trees_are_alive() -> None:
    model, other = model_of("qwen3_5_text"), model_of("qwen3_5_text", seed=1)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    before = other(input_ids=ids, use_cache=False).logits
    expected = dense(model, forest())
    out = dta_plugin.sequence_logprobs(model, forest(), PACKED, return_entropy=True)
    after = other(input_ids=ids, use_cache=False).logits
    assert out.entropies is not None and torch.equal(before, after)
    one, two = gradients(other, before.sin().sum()), gradients(other, after.sin().sum())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= 1e-4


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear"])
def test_generation_is_the_same_after_trees(family: str) -> None:
    model = model_of(family).eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def generated() -> list[torch.Tensor]:
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        return [model.generate(ids, **options, cache_implementation=kind) for kind in (None, "static")]

    before = generated()
    out = [dta_plugin.sequence_logprobs(model, forest(), config) for config in (PACKED, STREAMED)]
    assert all(map(torch.equal, before, generated())) and out


@pytest.mark.parametrize("config", [PACKED, STREAMED], ids=["packed", "streamed"])
def test_second_derivatives_are_an_error(config: TreeConfig) -> None:
    model = model_of("lfm2")
    logprobs = torch.cat(dta_plugin.sequence_logprobs(model, forest(), config).logprobs)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        found = torch.autograd.grad(logprobs.sum(), list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in found).backward()


def test_weights_that_are_not_in_memory_are_an_error() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("lfm2"))
    with pytest.raises(UnsupportedError, match="weights of Lfm2ForCausalLM are on the meta device, such as"):
        dta_plugin.sequence_logprobs(model, forest())


def test_the_probe_takes_the_rounding_of_a_delta_rule_for_what_it_is() -> None:
    """One look at it is too few: this was refused."""
    assert doctor_says(config_of("qwen3_5_text", options=True)) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "kimi_linear"])
def test_compiled_in_place(family: str) -> None:
    expected, model = dense(model_of(family), forest()), model_of(family)
    model.compile(backend="eager")
    for config, executor in ((PACKED, "packed"), (STREAMED, "streamed")):
        assert difference(through_tree(model, forest(), config=config, executor=executor), expected).worst <= 5e-5
