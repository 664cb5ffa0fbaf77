"""The models that the benchmarks train: Qwen3, small or of the released sizes, and a small Qwen3.5, at random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config

Module = TypeVar("Module", bound=torch.nn.Module)
LORA_RANK = 32

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


def qwen3_5() -> PretrainedConfig:
    """Three gated delta nets to one attention layer, as Qwen3.5 has them; transformers 5.2 and newer."""
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        vocab_size=8192,
        tie_word_embeddings=False,
        max_position_embeddings=32768,
    )


def released(layers: int, hidden: int, intermediate: int, heads: int) -> Qwen3Config:
    """The sizes of a released Qwen3; its vocabulary, its heads of 128 and 8 key-value heads."""
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "small": qwen3,
    "small-hybrid": qwen3_5,
    "qwen3-0.6b": lambda: released(28, 1024, 3072, 16),
    "qwen3-4b": lambda: released(36, 2560, 9728, 32),
}


def random_model(config: PretrainedConfig, device: torch.device | None = None) -> PreTrainedModel:
    """The same weights every time on a device; its attention setting is the model's own."""
    torch.manual_seed(0)
    with device or torch.device("cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        return model.train()


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    """Adapters on every linear layer, none of them zero: all of them have a gradient."""
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=LORA_RANK, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(model, options).to(model.dtype)


def without_adapters(model: Any) -> PreTrainedModel:
    """The model that PEFT wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def twin(model: Module) -> Module:
    """A copy with modules and settings of its own, and the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
