"""Tiny checkpoints that mbridge knows, dense and of experts; every parameter is random, norms and biases, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.adapters.verl.support import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def _models() -> dict[str, Any]:
    return {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=8)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**_COMMON)),
        "deep": Qwen3ForCausalLM(Qwen3Config(**_COMMON | {"num_hidden_layers": 4}, head_dim=8)),
        "tied": Qwen2ForCausalLM(Qwen2Config(**_COMMON | {"tie_word_embeddings": True})),
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=8)),
    }


def save_models(folder: Path) -> Path:
    """-> the folder, with a folder in it per model."""
    torch.manual_seed(0)
    for name, model in _models().items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder / name)
    return folder
