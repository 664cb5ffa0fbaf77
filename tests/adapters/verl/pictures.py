"""Tiny models with vision towers for verl, and rows with pictures as its agent loop hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLModel

from dta_plugin.adapters.verl_plugin.own_forwards import as_transformers_has_them
from tests.adapters.verl.recurrent import shake
from tests.adapters.verl.support import (
    END,
    PLACE,
    SHAPES,
    START,
    VIDEO,
    VOCABULARY,
    Sequences,
    Setup,
    Step,
    build,
    text_run,
    train,
)

_IDS = {
    "image_token_id": PLACE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY + 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
}
_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _TEXT["rope_parameters"] | {"partial_rotary_factor": 0.5},
}
KINDS: dict[str, tuple[type[PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, {}, {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, {}, {"fullatt_block_indexes": [1], "window_size": 16}),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        {},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5": (Qwen3_5ForConditionalGeneration, _HYBRID, {"num_position_embeddings": 16}),
}
# What verl replaces, for good, when it builds Qwen2-VL or Qwen2.5-VL.
QWEN2_5 = (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLAttention)
_QWEN2 = (Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLAttention)
REPLACED = {kind: kind.forward for kind in (*QWEN2_5, *_QWEN2)}
_PATCH = 3 * 2 * 4 * 4
Picture = dict[str, torch.Tensor]


def save_vision(folder: Path, family: str) -> Path:
    """A model of `KINDS`, every parameter random, and an adapter for all its projections in `adapter`."""
    kind, text, tower = KINDS[family]
    config = kind.config_class(
        text_config=_TEXT | text, vision_config=_TOWER | tower, tie_word_embeddings=False, **_IDS
    )
    config.architectures = [kind.__name__]
    torch.manual_seed(0)
    model = kind(config)
    shake(model, 0.15)
    model.save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(adapted, 0.1, "lora_B")
    adapted.save_pretrained(folder / "adapter")
    return folder


def weights(engine: Any) -> torch.Tensor:
    """Of this rank, flat."""
    found = (parameter.detach() for parameter in engine.module.parameters())
    return torch.cat([(p.to_local() if hasattr(p, "to_local") else p).flatten() for p in found]).clone()


def expected_of(setup: Setup, steps: Sequence[Step], folder: Path) -> list[dict[str, Any]]:
    """verl's engine with transformers' forwards.

    verl's own for Qwen2.5-VL need flash-attn where padding is removed, and fail on text alone.
    """
    with as_transformers_has_them():
        return train(build(setup, folder, tree=False), steps)


def picture(seed: int, height: int = 4, width: int = 4) -> Picture:
    """What a processor gives for one picture of so many patches."""
    pixels = torch.randn(height * width, _PATCH, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def shown(picture: Picture) -> list[int]:
    """Its place in a row."""
    return [START, *[PLACE] * (len(picture["pixel_values"]) // 4), END]


def inputs_of(pictures: list[Picture]) -> Picture:
    """`multi_modal_inputs` of a row, as verl's agent loop makes them."""
    if not pictures:
        return {}
    found = {name: torch.cat([one[name] for one in pictures]) for name in pictures[0]}
    grid = found["image_grid_thw"]
    return found | {"images_seqlens": torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])}


def pictures(seed: int = 0) -> tuple[Sequences, list[int], list[Picture]]:
    """Prompts of the same text with different pictures, text alone, two pictures, pictures in later turns of some rows.

    -> sequences, prompt lengths, multi_modal_inputs; siblings are not next to each other.
    """
    number = 1000 * seed
    wide, one, other, late, later = (picture(number + i, width=6 if i == 0 else 4) for i in range(5))
    text, question = text_run(7, number), text_run(4, number + 1)
    rows: list[tuple[list[int], list[int], list[Picture]]] = []
    for i in range(3):
        for shot in (one, other):
            rows.append((text + shown(shot) + question, text_run(4 + 2 * i, number + 10 + i), [shot]))
        if i < 2:
            rows.append((text + question, text_run(5 + i, number + 20 + i), []))
            both = shown(wide) + text + shown(one)
            rows.append((both, text_run(6 + i, number + 30 + i), [wide, one]))
            turn = text_run(3, number + 40) + shown((late, later)[i]) + text_run(5, number + 41 + i)
            rows.append((shown(wide) + question, turn, [wide, (late, later)[i]]))
    sequences = [prompt + response for prompt, response, _ in rows]
    return sequences, [len(prompt) for prompt, _, _ in rows], [inputs_of(found) for _, _, found in rows]


def one_sided(seed: int = 0) -> tuple[Sequences, list[int], list[Picture]]:
    """Rows with pictures, and as many rows of text: on two ranks, one has none."""
    rows = list(zip(*pictures(seed), strict=True))
    with_pictures = [row for row in rows if row[2]]
    for i in range(len(with_pictures)):
        prompt = text_run(12, 1000 * seed + 60 + i % 2)
        rows.append((prompt + text_run(3 + i, 1000 * seed + 70 + i), 12, {}))
    text_alone = rows[-len(with_pictures) :]
    return tuple(list(column) for column in zip(*with_pictures, *text_alone, strict=True))  # type: ignore[return-value]


SHAPES["pictures"], SHAPES["one-sided"] = pictures, one_sided
