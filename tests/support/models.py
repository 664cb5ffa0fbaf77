"""Tiny random models of every supported family, and what makes them exact in float64.

Every weight is random and large enough that attention matters, norms, biases and sinks included; a wrong mask then
changes log-probs by far more than any tolerance.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.support.trees import VOCABULARY

WINDOW = 5
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

# transformers' faster experts know no float64.
EAGER_EXPERTS: dict[str, Any] = (
    {"experts_implementation": "eager"} if Version(version("transformers")) >= Version("5") else {}
)

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma3": (Gemma3TextConfig, _SLIDING),
    "gemma2": (Gemma2Config, _SLIDING | _SOFTCAPS),
    "gpt_oss": (GptOssConfig, _SLIDING | _DEFAULT_ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Two layers, hidden size 32, grouped-query attention with heads of 8."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind, own = FAMILIES[family]
    return kind(**(common | own | changes))


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A random model in evaluation mode; the same arguments give the same weights."""
    return random_model(tiny_config(family, **changes), dtype, seed, attention)


def random_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None
) -> PreTrainedModel:
    """A model of this config whose vectors (norms, biases, sinks) are moved off their initial values, too."""
    options = EAGER_EXPERTS | ({} if attention is None else {"attn_implementation": attention})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += (1.0 if name.endswith("sinks") else 0.2) * torch.randn(parameter.shape)
    if dtype is torch.float64:
        norm_in_own_dtype(model)
    return model.to(dtype).eval()


def norm_in_own_dtype(model: torch.nn.Module) -> None:
    """Make every RMSNorm compute in its input's dtype; transformers' own goes through float32, a floor of 1e-7.

    The gain of Gemma's norms up to version 3 is one plus the weight; those with `with_scale` may have none.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)


def _rms_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    if hasattr(self, "with_scale"):
        return normed * self.weight if self.with_scale else normed
    return normed * (1.0 + self.weight if type(self).__name__.startswith("Gemma") else self.weight)


@contextmanager
def softmax_in_own_dtype() -> Iterator[None]:
    """Keep float64 in the softmaxes that transformers takes in float32: eager attention and MoE routers."""
    softmax = torch.nn.functional.softmax

    def wide(x: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, *args, dtype=x.dtype if x.dtype is torch.float64 else dtype, **kwargs)

    torch.nn.functional.softmax = wide
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax
