"""Rotary types that look at the longest position of a call: exact on either side of their length, refused across it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PhimoeConfig, PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.execution.streaming import chunk_runner as chunks
from tests.support.models import random_model, tiny_config, tiny_model
from tests.support.oracle import dense, difference
from tests.support.tree_run import through_tree

LIMIT = 16
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
_LONG = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0], "original_max_position_embeddings": LIMIT}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0} | _LONG
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONGROPE}


def longrope() -> PreTrainedModel:
    return tiny_model("llama", rope_parameters=dict(LONGROPE), max_position_embeddings=128)


def longrope_by_layer() -> PreTrainedModel:
    return tiny_model("gemma3", rope_parameters={k: dict(v) for k, v in BY_LAYER.items()}, max_position_embeddings=128)


def with_scales_of_its_own() -> PreTrainedModel:
    own: dict[str, Any] = {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.4}}
    small = {name: tiny_config("llama").to_dict()[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    return random_model(PhimoeConfig(**small, **sizes, **own, num_local_experts=2, max_position_embeddings=128))


def dynamic() -> PreTrainedModel:
    return tiny_model("llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=LIMIT)


def rows(*lengths: int) -> list[list[int]]:
    """Sequences with a common prefix."""
    prefix = list(range(10, 19))
    return [prefix + [30 + 3 * i + j for j in range(length - 9)] for i, length in enumerate(lengths)]


MODELS = [longrope, longrope_by_layer, with_scales_of_its_own]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("lengths", [(12, 14, 16), (17, 20, 23)], ids=["short", "long"])
def test_rows_on_one_side_are_exact(build: Any, lengths: tuple[int, ...]) -> None:
    expected, model = dense(build(), rows(*lengths)), build()
    packed = difference(through_tree(model, rows(*lengths)), expected)
    streamed = difference(through_tree(model, rows(*lengths), config=STREAMED, executor="streamed"), expected)
    assert max(packed.worst, streamed.worst) <= 1e-5, (packed, streamed)


def test_chunks_that_choose_for_themselves_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "as_long_as", lambda model, longest: nullcontext())
    expected = dense(longrope(), rows(17, 20, 23))
    found = difference(through_tree(longrope(), rows(17, 20, 23), config=STREAMED, executor="streamed"), expected)
    assert found.logprobs > 1e-3


def test_hooks_are_gone_afterwards() -> None:
    model = longrope()
    through_tree(model, rows(17, 20), config=STREAMED, executor="streamed")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.rotary_emb.modules())


@pytest.mark.parametrize("build", MODELS)
def test_rows_on_both_sides_are_refused(build: Any) -> None:
    for config in (None, STREAMED):
        with pytest.raises(UnsupportedError, match=r"12 to 20 tokens.*'longrope'.*more than 16.*one side"):
            dta_plugin.sequence_logprobs(build(), rows(12, 20), config)
    out = dta_plugin.sequence_logprobs(build(), rows(12, 20), TreeConfig(on_unsupported="dense"))
    assert out.report.executor == "dense"
    for actual, right in zip(out.logprobs, dense(build(), rows(12, 20)).logprobs, strict=True):
        assert torch.equal(actual, right)


def test_dynamic_frequencies_below_their_length() -> None:
    expected, model = dense(dynamic(), rows(12, 15)), dynamic()
    model(input_ids=torch.tensor([list(range(3, 43))]))  # a long call before leaves longer frequencies behind
    for config, executor in ((None, "packed"), (STREAMED, "streamed")):
        assert difference(through_tree(model, rows(12, 15), config=config, executor=executor), expected).worst <= 1e-5
    with pytest.raises(UnsupportedError, match=r"row has 20 tokens, and from 16 on.*'dynamic' depend on the calls"):
        dta_plugin.sequence_logprobs(dynamic(), rows(17, 20))


def test_an_unknown_type_is_refused() -> None:
    model = tiny_model("llama")
    model.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(UnsupportedError, match=r"rotary type 'spiral' of LlamaForCausalLM is not known"):
        dta_plugin.sequence_logprobs(model, rows(12, 14))
