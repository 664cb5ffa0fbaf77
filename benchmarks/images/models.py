"""The models of this benchmark: small ones in the proportions of released ones, and the same language model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
)

from benchmarks.common.models import twin

IMAGE_TOKEN, VISION_START, VISION_END = 1, 2, 3  # below all tokens of text
FIRST_TEXT = 5
# A tower takes about as much for the patches of a token as the language model does for the token, as in Qwen3-VL-2B.
_TOWER = {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 480}
_TEXT = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 4,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}


def qwen3_vl(smoke: bool) -> PretrainedConfig:
    text, tower = _sizes(smoke)
    sections = {"rope_parameters": _ROPE | {"mrope_section": [12, 10, 10]}, "head_dim": 64}
    tower |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(text_config=text | sections, vision_config=tower, tie_word_embeddings=False, **_TOKENS)


def qwen2_5_vl(smoke: bool) -> PretrainedConfig:
    text, tower = _sizes(smoke)
    sections = {"rope_parameters": _ROPE | {"mrope_section": [8, 12, 12] if not smoke else [4, 6, 6]}}
    tower |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [tower["depth"] - 1]}
    return Qwen2_5_VLConfig(text_config=text | sections, vision_config=tower, tie_word_embeddings=False, **_TOKENS)


def _sizes(smoke: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the language model and of the tower."""
    text = dict(_TEXT)
    tower = _TOWER | {"out_hidden_size": text["hidden_size"]}
    if smoke:
        text |= {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 64, "vocab_size": 512}
        tower |= {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": text["hidden_size"]}
    return text, tower


FAMILIES: dict[str, Callable[[bool], PretrainedConfig]] = {"qwen3_vl": qwen3_vl, "qwen2_5_vl": qwen2_5_vl}
_TEXT_CONFIGS = {"qwen3_vl": Qwen3Config, "qwen2_5_vl": Qwen2Config}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.train()


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The class of the language model alone, as for checkpoints without a tower, over the very same parameters."""
    text = model.config.text_config
    shared = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "rope_parameters")}
    config = _TEXT_CONFIGS[model.config.model_type](**shared, rope_parameters=_ROPE, tie_word_embeddings=False)
    alone: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = {text_name(name): parameter for name, parameter in model.named_parameters()}
    for name, _ in list(alone.named_parameters()):
        module, _, own = name.rpartition(".")
        setattr(alone.get_submodule(module), own, parameters[name])
    return alone.train()


def text_name(name: str) -> str:
    """Of a parameter, in the class of the language model alone."""
    return name.replace("model.language_model.", "model.")


def tower_flops(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> int:
    """Forward FLOPs of the tower for one image, counted as it runs: matrices on patches, attention on pairs."""
    counted = twin(model)
    counted.set_attn_implementation("eager")  # whose products are all counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted.base_model.get_image_features(**image)
    return counter.get_total_flops()
