"""The dispatcher in front of a model's attention: invisible without a tree, never bypassed unnoticed with one."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import InvalidInputError, PrefixTree, TreeLayout, TreeMask, UnsupportedError
from dta_plugin.models.attention_registry import install
from tests.support.dispatch import is_installed
from tests.support.models import tiny_model
from tests.support.oracle import dense, difference, gradients
from tests.support.tree_run import TOLERANCE, make_siblings_visible, through_tree
from tests.support.trees import SHAPES, branching_comb

pytestmark = pytest.mark.usefixtures("unprobed")  # calls are counted, and layers tampered with

# Every (family, attention) for which transformers has an implementation of its own on CPUs.
MODELS = [
    *((family, attention) for family in ("llama", "mistral", "gemma3", "qwen3_moe") for attention in ("sdpa", "eager")),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
]
both_paths = pytest.mark.parametrize("family,attention", MODELS)


def pair(family: str, attention: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(untouched, with the dispatcher in front)"""
    untouched, installed = (tiny_model(family, attention=attention) for _ in range(2))
    install(installed)
    assert is_installed(installed) and not is_installed(untouched)
    return untouched, installed


def left_padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@both_paths
def test_bit_identical_forward_and_gradients(family: str, attention: str) -> None:
    results = []
    for model in pair(family, attention):
        model.train()
        for batch in (left_padded(), {"input_ids": left_padded()["input_ids"]}):
            logits = model(**batch).logits
            loss = (logits.log_softmax(-1) * torch.sin(torch.arange(logits.shape[-1]))).sum()
            results.append((logits.detach(), gradients(model, loss)))
    for (a, grads_a), (b, grads_b) in ((results[0], results[2]), (results[1], results[3])):
        assert torch.equal(a, b)
        assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


@both_paths
def test_bit_identical_generation(family: str, attention: str) -> None:
    outputs = []
    for model in pair(family, attention):
        torch.manual_seed(0)
        out = model.generate(
            **left_padded(), max_new_tokens=12, do_sample=True, output_logits=True, return_dict_in_generate=True
        )
        outputs.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_packed_rows_are_still_packed_without_a_tree() -> None:
    """Positions that restart mean packed sequences to transformers; the dispatcher must not change that."""
    untouched, installed = pair("llama", "sdpa")
    inputs = {"input_ids": left_padded()["input_ids"][:1], "position_ids": torch.tensor([[*range(6), *range(8)]])}
    assert torch.equal(installed(**inputs, use_cache=False).logits, untouched(**inputs, use_cache=False).logits)


def tree_logits(model: PreTrainedModel) -> tuple[torch.Tensor, TreeMask]:
    layout = TreeLayout.from_tree(PrefixTree.from_sequences(SHAPES["forest"]))
    mask = TreeMask.from_layout(layout)
    with dta_plugin.tree_attention_scope(model):
        return model(**dta_plugin.model_inputs(layout, mask)).logits, mask


def test_scope_takes_a_tree() -> None:
    """The low-level entry: layout-order logits, which are those of each sequence."""
    untouched, model = (tiny_model("gemma3", torch.float64) for _ in range(2))
    logits, mask = tree_logits(model)
    assert mask.layers_seen == {0, 1}
    tree = PrefixTree.from_sequences(SHAPES["forest"])
    for s, sequence in enumerate(SHAPES["forest"]):
        expected = untouched(input_ids=torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(logits[0, tree.path(s)], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputed_layers_see_the_tree(monkeypatch: pytest.MonkeyPatch, use_reentrant: bool) -> None:
    """Checkpointing runs every layer again in the backward pass; a dense call in between must not confuse it."""
    calls: list[int] = []

    class CountingMask(TreeMask):
        def __len__(self) -> int:
            calls.append(1)
            return super().__len__()

    monkeypatch.setattr("dta_plugin.execution.packed.TreeMask", CountingMask)
    model = tiny_model("llama", torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    out = dta_plugin.sequence_logprobs(model, branching_comb(3))
    forward = len(calls)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    model.train()
    torch.cat(out.logprobs).sum().backward()
    assert len(calls) == 2 * forward > 0


def test_a_layer_with_another_implementation_has_a_dispatcher_of_its_own() -> None:
    untouched, model = (tiny_model("llama") for _ in range(2))
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation_internal = "eager"
    found = through_tree(model, SHAPES["forest"])
    assert difference(found, dense(untouched, SHAPES["forest"])).worst < TOLERANCE[torch.float32]


def test_a_replaced_attention_forward_is_reported() -> None:
    model = tiny_model("llama")

    def own(self: torch.nn.Module, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return hidden_states, None

    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(own, layer.self_attn)
    with pytest.raises(UnsupportedError, match=r"layer\(s\) \[0, 1\].*switch off whatever patches attention"):
        dta_plugin.sequence_logprobs(model, SHAPES["forest"])


def test_an_attention_bias_of_the_layer_is_reported() -> None:
    """Doge-like models add a bias to the mask inside the layer; the tree would ignore it."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def biased(hidden_states: torch.Tensor, **kwargs: object) -> object:
        tokens = hidden_states.shape[1]
        return forward(hidden_states, **(kwargs | {"attention_mask": torch.zeros(1, 1, tokens, tokens)}))

    attention.forward = biased
    with pytest.raises(UnsupportedError, match=r"LlamaAttention adds a mask or bias of its own.*shape \(1, 1"):
        dta_plugin.sequence_logprobs(model, SHAPES["forest"])


def test_negative_control_scope() -> None:
    model = tiny_model("llama", torch.float64)
    right, _ = tree_logits(model)
    with pytest.MonkeyPatch.context() as patch:
        make_siblings_visible(patch)
        wrong, _ = tree_logits(model)
    assert (right - wrong).abs().max() > 1e-2


def test_a_batch_of_two_rows_is_refused() -> None:
    model = tiny_model("llama")
    layout = TreeLayout.from_tree(PrefixTree.from_sequences([[5, 6, 7]]))
    inputs = dta_plugin.model_inputs(layout, TreeMask.from_layout(layout))
    inputs["input_ids"] = inputs["input_ids"].expand(2, -1)
    with (
        dta_plugin.tree_attention_scope(model),
        pytest.raises(InvalidInputError, match="pack the tree's tokens as one row"),
    ):
        model(**inputs)
