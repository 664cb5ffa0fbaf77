"""The CPU rollout takes over an actor's weights, whatever they are called, or says what does not fit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig
from transformers.core_model_loading import revert_weight_conversion
from verl.workers.config import RolloutConfig

from dta_plugin.adapters.verl_cpu.rollout import HFServer
from dta_plugin.errors import InvalidInputError

SIZES = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "dense": Qwen3Config(**SIZES, tie_word_embeddings=False),
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=False),
}


def actor(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def server(name: str, folder: Path) -> HFServer:
    CONFIGS[name].save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(20)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    config = RolloutConfig(name="hf_cpu", dtype="float32", prompt_length=4, response_length=4)
    return HFServer(config, OmegaConf.create({"path": str(folder), "trust_remote_code": False}), 0)


@pytest.mark.parametrize("saved", [False, True], ids=["the model's names", "a checkpoint's names"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_weights_arrive(name: str, saved: bool, tmp_path: Path) -> None:
    model, rollout = actor(name), server(name, tmp_path)
    weights = dict(model.state_dict())
    if saved:
        weights = dict(revert_weight_conversion(model, weights))
        assert any("experts.3." in key for key in weights) == (name == "experts")
    if name == "tied":
        del weights["lm_head.weight"]
    ids = torch.arange(8)[None]
    assert not torch.allclose(rollout.model(ids).logits, model(ids).logits)
    asyncio.run(rollout.load_weights(weights, 3))
    assert torch.equal(rollout.model(ids).logits, model(ids).logits)
    assert rollout.steps == 3 and not rollout.model.training


@pytest.mark.parametrize("name", CONFIGS)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    rollout = server(name, tmp_path)
    kept, weights = rollout.model, dict(actor(name).state_dict())
    weights["renamed.weight"] = weights.pop("model.norm.weight")
    with pytest.raises(InvalidInputError, match=r"(?s)renamed\.weight|model\.norm\.weight") as error:
        asyncio.run(rollout.load_weights(weights, 1))
    assert "renamed.weight" in str(error.value) and "model.norm.weight" in str(error.value)
    assert rollout.model is kept and rollout.steps is None
