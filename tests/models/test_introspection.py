"""What the executors read off a model: wrappers, the LM head's scale and soft-cap, FLOPs, and the router loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    GraniteConfig,
    PretrainedConfig,
    SmolLM3Config,
)

from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.models.introspection import causal_lm, lm_head, model_cost, tree_forward
from tests.support.models import random_model, tiny_config, tiny_model
from tests.support.oracle import dense, difference, gradients
from tests.support.tree_run import through_tree
from tests.support.trees import VOCABULARY, branching_comb

SEQUENCES = branching_comb(4)
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}

MORE: dict[str, PretrainedConfig] = {
    "cohere: logits times a scale": CohereConfig(**SHARED, logit_scale=0.3),
    "cohere2: layers with and without positions": Cohere2Config(**SHARED, sliding_window=5, logit_scale=0.3),
    "granite: logits divided by a scale, own attention scale": GraniteConfig(
        **SHARED, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5
    ),
    "smollm3: layers without positions": SmolLM3Config(**SHARED, no_rope_layers=[1, 0]),
    "deepseek_v3: latent attention, values of another size": DeepseekV3Config(
        **(SHARED | _MLA | _DEEPSEEK | {"num_key_value_heads": 4}), first_k_dense_replace=1
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_more_families(name: str) -> None:
    found = difference(through_tree(random_model(MORE[name]), SEQUENCES), dense(random_model(MORE[name]), SEQUENCES))
    assert found.worst <= 1e-5, found


def test_causal_lm_looks_into_wrappers() -> None:
    model = tiny_model("llama")
    wrapped: Any = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module._orig_mod = model
    assert causal_lm(wrapped) is model
    with pytest.raises(UnsupportedError, match=r"Got a Sequential. Expected a Hugging Face causal LM"):
        causal_lm(torch.nn.Sequential(model))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"LlamaModel has no output embedding.*AutoModelForCausalLM"):
        lm_head(tiny_model("llama").model)


def test_tree_forward_gives_the_forward_back() -> None:
    model = tiny_model("llama")
    for own in (False, True):
        if own:
            model.forward = lambda **_: "patched"
        before = model.__dict__.get("forward")
        with pytest.raises(ZeroDivisionError), tree_forward(model, lambda self, **inputs: len(inputs)):
            assert model(a=1, b=2) == 2
            raise ZeroDivisionError
        assert model.__dict__.get("forward") is before


def test_cost_counts_weights_heads_and_windows() -> None:
    config = tiny_config("gemma2")
    model = tiny_model("gemma2")
    cost = model_cost(model)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert cost.per_token == 2 * layers
    assert cost.per_scored == 2 * config.hidden_size * config.vocab_size
    assert cost.per_pair == 4 * 4 * 8
    assert cost.per_window_pair == ((config.sliding_window, 4 * 4 * 8),)


def test_cost_counts_active_experts_only() -> None:
    model = tiny_model("qwen3_moe")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
    assert model_cost(model).per_token == 2 * (rest + experts // 2)


def test_a_window_without_layer_types_is_a_window_in_every_layer() -> None:
    cost = model_cost(tiny_model("mistral"))
    assert (cost.per_pair, cost.per_window_pair) == (0, ((5, 2 * 4 * 4 * 8),))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_router_loss_is_that_of_the_flat_batch(family: str) -> None:
    """Load balancing of all rollouts as the dense path sees them: share of choices times mean probability."""
    pristine, model = tiny_model(family), tiny_model(family)
    logits = [
        torch.cat(pristine(input_ids=torch.tensor([s]), output_router_logits=True).router_logits, dim=0).view(2, -1, 4)
        for s in SEQUENCES
    ]
    probabilities = torch.cat(logits, dim=1).flatten(0, 1).softmax(dim=-1)
    chosen = torch.nn.functional.one_hot(probabilities.topk(2).indices, 4).float()
    expected = 4 * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()

    batch = prepare_batch(model, SEQUENCES, None, TreeConfig())
    result = run_tree(model, batch, TreeConfig(), return_router_loss=True)
    assert result.router_loss is not None
    torch.testing.assert_close(result.router_loss, expected, rtol=1e-5, atol=0)
    actual, right = gradients(model, result.router_loss), gradients(pristine, expected)
    assert right["model.layers.0.self_attn.q_proj.weight"].norm() > 1e-4
    for name, gradient in right.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_lm_head_of_a_family() -> None:
    head = lm_head(random_model(MORE["cohere: logits times a scale"]), torch.float32)
    assert (head.scale, head.softcap, head.dtype, head.is_plain) == (0.3, None, torch.float32, True)
    head = lm_head(tiny_model("gemma2"))
    assert (head.scale, head.softcap, head.dtype) == (1.0, 3.0, None)
