"""Tiny Gemma 4 and Gemma 3n: layers that differ in head dim, window, keys of their own, and MLP."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.support.models import WINDOW, norm_in_own_dtype
from tests.support.trees import VOCABULARY

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_GEMMA4 = {"global_head_dim": 16, "final_logit_softcapping": 3.0}
_GEMMA3N = {
    "num_kv_shared_layers": 2,
    "intermediate_size": [48, 32, 48, 64],
    "activation_sparsity_pattern": [0.0, 0.5, 0.0, 0.0],
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}

# name: (model type, changes of the text config)
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("gemma4_text", _GEMMA4),
    "text, shared keys": ("gemma4_text", _GEMMA4 | _SHARED_KEYS),
    "text, experts": ("gemma4_text", _GEMMA4 | _EXPERTS | {"hidden_size_per_layer_input": 0}),
    "text, k = v": ("gemma4_text", _GEMMA4 | _KEYS_ARE_VALUES | {"use_bidirectional_attention": "vision"}),
    "text, all at once": ("gemma4_text", _GEMMA4 | _SHARED_KEYS | _EXPERTS | _KEYS_ARE_VALUES),
    "gemma4": ("gemma4", _GEMMA4 | _SHARED_KEYS | {"use_bidirectional_attention": "vision"}),
    "unified": ("gemma4_unified", _GEMMA4 | _KEYS_ARE_VALUES | {"use_bidirectional_attention": "vision"}),
    "gemma3n text": ("gemma3n_text", _GEMMA3N),
}
_WITH_IMAGES = ("gemma4", "gemma4_unified")


def gemma_config(name: str) -> PretrainedConfig:
    kind, changes = GEMMAS[name]
    if kind not in _WITH_IMAGES:
        return AutoConfig.for_model(kind, **(_TEXT | changes))
    return AutoConfig.for_model(kind, text_config=_TEXT | changes, vision_config=None, audio_config=None)


def gemma_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Every parameter random, norms, scales and gates included; the same arguments give the same weights."""
    config = gemma_config(name)
    auto = AutoModelForImageTextToText if GEMMAS[name][0] in _WITH_IMAGES else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32, experts_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape) if parameter.ndim != 2 else 0
    if dtype is torch.float64:
        norm_in_own_dtype(model)
    return model.to(dtype).eval()
