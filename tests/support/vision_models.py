"""Tiny random vision-language models, and rows with images as their processors would return them.

Every parameter is random. Images are random pixels; a row is a list of parts: token ids, and numbers of images.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, VOCABULARY = 90, 99
Part = list[int] | int  # token ids, or the number of an image

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


@dataclass(frozen=True, slots=True)
class Rows:
    """sequences: token ids. images: per sequence, what a processor would return for its images, or None."""

    sequences: list[list[int]]
    images: list[dict[str, torch.Tensor] | None]

    def dense_inputs(self, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
        """Per row, what the model's own forward gets beside ids, its kinds of tokens included."""
        taken = inspect.signature(type(model).forward).parameters
        kinds = [name for name in ("mm_token_type_ids", "token_type_ids") if name in taken]
        found: list[dict[str, torch.Tensor]] = []
        for ids, images in zip(self.sequences, self.images, strict=True):
            is_image = torch.tensor([ids]).eq(IMAGE).long()
            found.append({} if images is None else images | dict.fromkeys(kinds, is_image))
        return found


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
    form = FAMILIES[family][1]
    sequences, images = [], []
    for row in parts:
        ids: list[int] = []
        found: list[dict[str, torch.Tensor]] = []
        for part in row:
            if isinstance(part, int):
                tokens, inputs = _image(form, part, dtype)
                ids += tokens
                found.append(inputs)
            else:
                ids += part
        sequences.append(ids)
        images.append(over_images(found) if found else None)
    return Rows(sequences, images)


def over_images(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As a processor returns them: padded to the largest where images have sizes of their own."""
    joined = {}
    for name in found[0]:
        values = [inputs[name] for inputs in found]
        if name == "pixel_values" and values[0].ndim == 4:
            height, width = (max(value.shape[axis] for value in values) for axis in (2, 3))
            values = [torch.nn.functional.pad(v, (0, width - v.shape[3], 0, height - v.shape[2])) for v in values]
        joined[name] = torch.cat(values)
    return joined


def _image(form: str, number: int, dtype: torch.dtype) -> tuple[list[int], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 + number)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    height, width = [(4, 4), (4, 8), (8, 4), (4, 6)][number % 4]  # in patches of 2 pixels, two of which make a token
    tokens = height * width // 4
    if form == "grid":
        inputs = {
            "pixel_values": pixels(height * width, 3 * 2 * 2 * 2),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        return [92, *[IMAGE] * tokens, 93], inputs
    if form == "square":
        return [94, *[IMAGE] * 4, 95], {"pixel_values": pixels(1, 3, 16, 16)}
    if form == "sizes":
        row = [IMAGE] * (width // 2)
        ids = [token for _ in range(height // 2) for token in [*row, 94]]
        return ids, {
            "pixel_values": pixels(1, 3, 2 * height, 2 * width),
            "image_sizes": torch.tensor([[2 * height, 2 * width]]),
        }
    most = 32
    places = torch.full((1, most, 2), -1)
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    places[0, : height * width] = grid
    values = pixels(1, most, 3 * 2 * 2).abs().clamp(max=1)
    values[0, height * width :] = 0
    return [94, *[IMAGE] * tokens, 95], {"pixel_values": values, "image_position_ids": places}
