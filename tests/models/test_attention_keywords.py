"""What the dispatcher makes of attention functions' keywords: known ones count, others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from tests.support.models import WINDOW, random_model, tiny_config, tiny_model
from tests.support.oracle import dense, difference
from tests.support.tree_run import make_siblings_visible, through_tree
from tests.support.trees import branching_comb

SEQUENCES = branching_comb(4)
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
_COMMON = tiny_config("llama").to_dict()
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# Layers that hand on no keywords, that attend twice, that are gone through several times.
UNUSUAL: dict[str, dict[str, Any]] = {"stablelm": {}, "nemotron": {}, "diffllama": {}, "dory": _WINDOW, "hrm_text": {}}


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    return random_model(AutoConfig.for_model(family, **({name: _COMMON[name] for name in _KEPT} | changes)))


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_calls_of_attention_are_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = dense(model_of(family, **UNUSUAL[family]), SEQUENCES), model_of(family, **UNUSUAL[family])
    packed = difference(through_tree(model, SEQUENCES), expected)
    streamed = difference(through_tree(model, SEQUENCES, config=STREAMED, executor="streamed"), expected)
    assert max(packed.worst, streamed.worst) <= 4e-5, (packed, streamed)
    make_siblings_visible(monkeypatch)
    assert difference(through_tree(model, SEQUENCES), expected).logprobs > 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_layers_that_hand_on_no_keywords_are_recomputed_with_the_tree(use_reentrant: bool) -> None:
    expected, model = dense(model_of("stablelm"), SEQUENCES), model_of("stablelm").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for config, executor in ((None, "packed"), (STREAMED, "streamed")):
        found = difference(through_tree(model, SEQUENCES, config=config, executor=executor), expected)
        assert found.worst <= 4e-5, (executor, found)


def test_two_calls_in_a_layer_cannot_be_recomputed_in_chunks() -> None:
    expected, model = dense(model_of("diffllama"), SEQUENCES), model_of("diffllama").train()
    model.gradient_checkpointing_enable()
    assert difference(through_tree(model, SEQUENCES), expected).worst <= 4e-5
    with pytest.raises(UnsupportedError, match=r"Layer\(s\) \[0, 1\] of DiffLlama.* more than once.*packed"):
        through_tree(model, SEQUENCES, config=STREAMED)


def test_a_window_that_only_the_mask_knows() -> None:
    model = model_of("qwen2_moe", use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW, **_EXPERTS)
    with pytest.raises(UnsupportedError, match=r"does not tell its attention .* window of 5; set layer_types"):
        dta_plugin.sequence_logprobs(model, SEQUENCES)
    exact = model_of("qwen2_moe", **_EXPERTS)
    expected = dense(model_of("qwen2_moe", **_EXPERTS), SEQUENCES)
    assert difference(through_tree(exact, SEQUENCES), expected).worst <= 1e-5


def widened(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.sliding_window = WINDOW + 1


def window_in_a_full_layer(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.sliding_window = WINDOW


@pytest.mark.parametrize("spoil", [widened, window_in_a_full_layer])
def test_a_window_against_the_config(spoil: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("gemma3")
    spoil(model)
    with pytest.raises(UnsupportedError, match=r"a window of [56] in layer [01], and its config says"):
        dta_plugin.sequence_logprobs(model, SEQUENCES)


def told(model: PreTrainedModel, **keywords: object) -> PreTrainedModel:
    """Layer 1 passes on more to its attention function."""
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **rest: own(*args, **rest, **keywords)
    return model


def test_keywords_of_unknown_meaning_are_refused_by_name() -> None:
    for name in ("position_bias", "block_indices", "cu_seq_lens_q", "something_new"):
        model = told(tiny_model("llama"), **{name: torch.ones(1)})
        with pytest.raises(UnsupportedError, match=rf"LlamaAttention gives its attention function {name}, which"):
            dta_plugin.sequence_logprobs(model, SEQUENCES)
        out = dta_plugin.sequence_logprobs(tiny_model("llama"), SEQUENCES)
        assert out.report.executor == "packed"


def test_keywords_without_effect_change_nothing() -> None:
    model = told(tiny_model("llama"), output_attentions=True, something_new=None, cache_position=torch.ones(1))
    assert difference(through_tree(model, SEQUENCES), dense(tiny_model("llama"), SEQUENCES)).worst <= 1e-5


def test_attention_in_both_directions_is_refused_where_it_acts() -> None:
    with pytest.raises(UnsupportedError, match=r"both directions \(is_causal=False\)"):
        dta_plugin.sequence_logprobs(told(tiny_model("llama"), is_causal=False), SEQUENCES)


def test_dropout_is_read_where_it_acts() -> None:
    """A layer keeps the rate that it was made with, whatever the config says later."""
    model = tiny_model("llama", attention_dropout=0.1).train()
    model.config.attention_dropout = 0.0
    with pytest.raises(UnsupportedError, match=r"attention_dropout is 0.1 in layer 0"):
        dta_plugin.sequence_logprobs(model, SEQUENCES)
    model = tiny_model("llama").train()
    model.config.attention_dropout = 0.1
    assert difference(through_tree(model, SEQUENCES), dense(tiny_model("llama"), SEQUENCES)).worst <= 1e-5
