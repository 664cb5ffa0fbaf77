"""The model that the benchmarks train: a small Qwen3 with random weights."""

from __future__ import annotations

import copy

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

# What describes a model in a result file.
MODEL_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def qwen3(layers: int = 4, hidden: int = 256, vocab: int = 8192) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=vocab,
        tie_word_embeddings=False,
        max_position_embeddings=32768,
    )


def random_model(config: Qwen3Config) -> Qwen3ForCausalLM:
    """The same weights every time; its attention setting is the model's own."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(copy.deepcopy(config)).train()
