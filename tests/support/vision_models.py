"""Tiny random vision-language models of the families that most tests are about; every parameter is random.

Rows with images for them are those of `vision_images`; more families are in `vision_families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.support.vision_images import IMAGE, Part, Rows, rows_in

VOCABULARY = 99

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_QWEN_TOWER = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "in_channels": 3}
_QWEN3_TOWER = _QWEN_TOWER | {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
_DELTA_RULE = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

# Trees with images: rows of token ids and numbers of images. Equal numbers are the same image; 0 and 4 have one size.
SCENARIOS: dict[str, list[list[Part]]] = {
    "one": [[[1, 2], 0, [3, 4, 5]], [[1, 2], 0, [3, 6, 7, 8]], [[1, 2], 0, [9]]],
    "two": [[[1, 2], 0, [3], 1, [4, 5]], [[1, 2], 0, [3], 1, [6]], [[1, 2], 0, [3], 1, [6, 7]]],
    "same text": [[[1, 2], 0, [3, 4]], [[1, 2], 0, [3, 5]], [[1, 2], 4, [3, 4]], [[1, 2], 4, [3, 5]]],
    "in the middle": [[[1, 2, 3], 0, [4, 5]], [[1, 2, 3], 1, [4, 5]], [[1, 2, 3, 4]], [[1, 2, 3], 0, [4, 6]]],
    "in some branches": [
        [[1, 2, 3], 0, [4, 5], 1, [6]],
        [[1, 2, 3], 0, [4], 2, [6]],
        [[1, 2, 3], 0, [4, 5, 7]],
        [[5, 6]],
    ],
    "repeated": [[[1], 0, [2], 0, [3, 4]], [[1], 0, [2], 0, [3, 5]], [[1], 0, [2], 4, [3, 5]]],
}

# Per family: what its config is made of, and the form of its images.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen2_vl": (
        {
            "text_config": _TEXT | _ROPE,
            "vision_config": _QWEN_TOWER | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **_QWEN_IDS,
        },
        "grid",
    ),
    "qwen2_5_vl": (
        {
            "text_config": _TEXT | _ROPE,
            "vision_config": _QWEN_TOWER
            | {"intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 8},
            **_QWEN_IDS,
        },
        "grid",
    ),
    "qwen3_vl": (
        {
            "text_config": _TEXT | _ROPE,
            "vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]},
            **_QWEN_IDS,
        },
        "grid",
    ),
    "qwen3_5": (
        {"text_config": _TEXT | _DELTA_RULE | _ROPE, "vision_config": _QWEN3_TOWER, **_QWEN_IDS},
        "grid",
    ),
    "gemma3": (
        {
            "text_config": _TEXT
            | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            "vision_config": _TOWER | {"image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        "square",
    ),
    "gemma4": (
        {
            "text_config": _TEXT
            | {
                "use_bidirectional_attention": "vision",
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "global_head_dim": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "num_kv_shared_layers": 0,
            },
            "vision_config": _TOWER
            | {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": 91,
            "audio_token_id": 92,
        },
        "places",
    ),
    "mistral3": (
        {
            "text_config": {"model_type": "mistral"} | _TEXT,
            "vision_config": {"model_type": "pixtral", "head_dim": 8, "image_size": 32, "patch_size": 2} | _TOWER,
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        "sizes",
    ),
    "internvl": (
        {
            "text_config": {"model_type": "qwen2"} | _TEXT,
            "vision_config": _TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        "square",
    ),
}


def vision_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **text: Any) -> PreTrainedModel:
    """text: changes of the text config."""
    config, _ = FAMILIES[family]
    config = config | {"text_config": config["text_config"] | text}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **config), attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim > 1 else 0.2
            centre = parameter if parameter.ndim == 1 and "norm" in name else 0.0
            parameter.copy_(centre + scale * noise)
    return model.to(dtype).eval()


def rows_of(family: str, parts: Sequence[Sequence[Part]], dtype: torch.dtype = torch.float64) -> Rows:
    """Sequences of token ids and images. Images of other numbers have other pixels, and sizes where the form has."""
    return rows_in("grid 24" if FAMILIES[family][1] == "grid" else FAMILIES[family][1], parts, dtype)
