"""Layers that differ from each other: Gemma 4 and 3n are exact; estimates read sizes from modules and never raise."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.execution import auto, memory
from dta_plugin.execution.calibration_store import describe
from dta_plugin.models.introspection import attention_kinds, model_cost
from dta_plugin.models.sizes import attention_sizes
from tests.support.gemma import GEMMAS, gemma_model
from tests.support.models import softmax_in_own_dtype, tiny_model
from tests.support.oracle import dense, difference
from tests.support.tree_run import make_siblings_visible, through_tree
from tests.support.trees import branching_comb

SEQUENCES = branching_comb(4)
CPU = torch.device("cpu")
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
# Gemma 3n's router takes its tanh in float32 whatever it is given.
TOLERANCE = dict.fromkeys(GEMMAS, 1e-10) | {"gemma3n text": 1e-6}


@pytest.mark.parametrize("name", GEMMAS)
def test_packed_and_streamed_are_exact(name: str) -> None:
    with softmax_in_own_dtype():
        expected = dense(gemma_model(name, torch.float64), SEQUENCES)
        model = gemma_model(name, torch.float64)
        packed = difference(through_tree(model, SEQUENCES), expected)
        streamed = difference(through_tree(model, SEQUENCES, config=STREAMED, executor="streamed"), expected)
    assert max(packed.worst, streamed.worst) <= TOLERANCE[name], (packed, streamed)


@pytest.mark.slow
@pytest.mark.parametrize("name", GEMMAS)
def test_float32(name: str) -> None:
    expected, model = dense(gemma_model(name), SEQUENCES), gemma_model(name)
    packed = difference(through_tree(model, SEQUENCES), expected)
    streamed = difference(through_tree(model, SEQUENCES, config=STREAMED, executor="streamed"), expected)
    assert max(packed.worst, streamed.worst) <= 4e-5, (packed, streamed)


@pytest.mark.parametrize("name", ["text, shared keys", "gemma3n text"])
def test_layers_without_keys_of_their_own_are_recomputed(name: str) -> None:
    """With checkpointing, a layer that reads another one's keys finds them again, and they get its gradient."""
    expected = dense(gemma_model(name, torch.float64), SEQUENCES)
    model = gemma_model(name, torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for config, executor in ((None, "packed"), (STREAMED, "streamed")):
        found = difference(through_tree(model, SEQUENCES, config=config, executor=executor), expected)
        assert found.worst <= 1e-6, (executor, found)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("name", ["text, all at once", "gemma3n text"])
def test_visible_siblings_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dense(gemma_model(name, torch.float64), SEQUENCES)
    make_siblings_visible(monkeypatch)
    assert difference(through_tree(gemma_model(name, torch.float64), SEQUENCES), expected).logprobs > 1e-2


def test_sizes_are_those_of_each_layer() -> None:
    sizes = attention_sizes(gemma_model("text, all at once"))
    assert [x.head_dims for x in sizes] == [(8, 8), (16, 16)] * 2
    assert [x.kv_heads for x in sizes] == [2, 1] * 2
    assert [x.window for x in sizes] == [5, None] * 2


def test_streaming_asks_about_every_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma_model("text")
    assert {kind.head_dims for kind in attention_kinds(model, CPU)} == {(8, 8), (16, 16)}
    monkeypatch.setattr(auto, "serving_backend", lambda _, kind: "flex" if kind.head_dims == (16, 16) else "cpu")
    assert dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(max_tree_tokens_per_chunk=99)).report
    with pytest.raises(dta_plugin.InvalidInputError, match="attention through backend 'flex'"):
        dta_plugin.sequence_logprobs(model, SEQUENCES, STREAMED)


def linear_numbers(model: PreTrainedModel) -> int:
    return sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))


def test_costs_count_what_multiplies_every_token() -> None:
    """Tables of per-layer embeddings are looked up; two of four experts are passed."""
    model = gemma_model("text, all at once")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    cost = model_cost(model)
    assert cost.per_token == 2 * (linear_numbers(model) + experts // 2)
    assert cost.per_pair == 2 * 4 * 4 * 16
    assert cost.per_window_pair == ((5, 2 * 4 * 4 * 8),)


def test_vision_towers_cost_text_nothing() -> None:
    model = tiny_model("llama")
    before = model_cost(tiny_model("llama"))
    model.vision = nn.Linear(32, 32)
    assert model_cost(model) == before


class Packed(nn.Linear):
    """A linear layer whose weight is stored as two 4-bit numbers per byte in one column, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_four_bit_weights_cost_what_they_multiply() -> None:
    model = tiny_model("llama")
    expected, expected_bytes = model_cost(tiny_model("llama")), memory.bytes_per_token(tiny_model("llama"))
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(owner, name, Packed(linear))
    assert model_cost(model) == expected
    assert memory.bytes_per_token(model) == expected_bytes


def hidden_sizes_by_layer(model: PreTrainedModel) -> None:
    vars(model.config)["hidden_size"] = [32, 32]


def without_decoder(model: PreTrainedModel) -> None:
    model.get_decoder = lambda: 1 / 0


@pytest.mark.parametrize("spoil", [hidden_sizes_by_layer, without_decoder])
def test_an_estimate_never_stops_a_run(
    spoil: Callable[[PreTrainedModel], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected, model = dense(tiny_model("llama"), SEQUENCES), tiny_model("llama")
    spoil(model)
    with caplog.at_level(logging.WARNING, "dta_plugin"):
        for executor in ("packed", "auto"):
            found = difference(through_tree(model, SEQUENCES, config=TreeConfig(executor=executor)), expected)
            assert found.worst <= 1e-5
    said = [record.getMessage() for record in caplog.records]
    assert said and len(said) == len(set(said))
    assert all("of LlamaForCausalLM is a guess" in line for line in said)
    assert model_cost(model).per_token > 0 and memory.bytes_per_token(model) > 0


def test_a_calibration_is_found_for_layers_that_differ() -> None:
    about = describe(gemma_model("text, all at once"))
    assert (about["num_key_value_heads"], about["num_attention_heads"]) == (None, 4)
