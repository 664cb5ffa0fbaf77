"""Tiny models with recurrent layers on disk, every parameter random, for real trainers.

Their epsilon of 1e-2 is there for the norm behind Qwen3.5's delta rule: it divides by what a head reads from its state,
which is nearly 0 for a token here and there. With 1e-6, two stock trainings that pad differently are 1.5e-4 apart in
gradient norms (1e-6 in weights), as far as a tree is from either; with 1e-2, both are 1e-7 apart.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.adapters.trl.support import GEOMETRY, tokenizer

needs_them = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.15"), reason="mixers ask caches differently"
)

# Every projection of a delta rule's mixer, and some of attention.
MIXER_LORA = LoraConfig(
    r=4,
    lora_alpha=16,
    lora_dropout=0.0,
    init_lora_weights=False,
    target_modules=["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj", "v_proj"],
)

_LAYERS: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA_RULE: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rms_norm_eps": 1e-2,
    **_LAYERS,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "attn_layer_indices": [1]}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": GEOMETRY | _DELTA_RULE,
    "qwen3_5": {"text_config": GEOMETRY | _DELTA_RULE, "vision_config": _VISION},
    "bamba": GEOMETRY | _MAMBA2,
    "lfm2": GEOMETRY | {"layer_types": ["conv", "full_attention"]},
}


class TextProcessor(ProcessorMixin):
    """A processor of texts alone."""

    image_token = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)

    def __call__(self, text: Any = None, **_: Any) -> Any:
        return self.tokenizer(text)


def save_hybrid(family: str, folder: Path, **changes: Any) -> str:
    """Returns the folder's name. qwen3_5: the class that takes images, too. changes: of the config."""
    tokenizer().save_pretrained(folder)
    config = CONFIG_MAPPING[family](**FAMILIES[family] | changes)
    set_seed(0)
    kind: Any = AutoModelForImageTextToText if "vision_config" in FAMILIES[family] else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return str(folder)
