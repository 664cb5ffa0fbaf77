"""Tiny random models of every family with images that can be built here, from nothing but its config class.

Beside those of `vision_models`. Sizes are those of `dta_plugin.cli.miniature`; stated here is what those do not tell:
ids of tokens, the size of towers, and the form of images (`vision_images`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dta_plugin.cli import miniature
from tests.support.models import EAGER_EXPERTS
from tests.support.tiny_families import config_of
from tests.support.vision_images import END, IMAGE, INDICATORS, START

NAMES: list[str] = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

_ID, _INDEX = {"image_token_id": IMAGE}, {"image_token_index": IMAGE}
_VIDEO = {"video_token_id": 91}
_QWEN = _ID | _VIDEO | {"vision_start_token_id": START, "vision_end_token_id": END}
_GLM = _ID | _VIDEO | {"image_start_token_id": START, "image_end_token_id": END}
_GLM |= {"video_start_token_id": 87, "video_end_token_id": 88}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HALF_ROPE = _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
_POSITIONS = {"text_config": {"rope_parameters": _ROPE}}

_SQUARE = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2}
_TILES = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_PATCHES = {"patch_size": 2, "num_hidden_layers": 2}
_SIZED = _PATCHES | {"image_size": 32}
_QWEN2_TOWER = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 2, "in_channels": 3}
_GRID = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "depth": 2}
_GLM_TOWER = _GRID | {"image_size": 16, "in_channels": 3}
_WINDOWS = _GRID | {"fullatt_block_indexes": [1], "window_size": 8}
_QWEN3_TOWER = _GRID | {"num_position_embeddings": 16}
_DEEPSTACK = _QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]}
_SAM = {"patch_size": 2, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48}
_SAM |= {"num_hidden_layers": 2}
_STRIPS = {"patch_size": 2, "insert_layer_id": 0, "vision_config": _SIZED | {"insert_layer_id": 0}}
_NEWLINES = _PATCHES | {"out_hidden_size": 32, "num_key_value_heads": 4, "max_image_size": 32}
_INKLING = _PATCHES | {"text_hidden_size": 32, "posemb_grid_size": 8, "projection_hidden_dim": 48}
_CODES = {"codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "channel_multiplier": [1, 1], "num_res_blocks": 1}
_CODES |= {"base_channels": 32}
_WAVES = {"hidden_size": 32, "codebook_dim": 32, "codebook_size": 16, "num_filters": 4, "decoder_hidden_size": 32}
_WAVES |= {"decoder_intermediate_size": 48, "decoder_num_layers": 1, "decoder_attention_num_groups": 4}

# Per family: what its config is made of, and the form of its images.
MORE_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "apertus1p5": (
        _ID
        | {"audio_token_id": 89, "image_token_offset": 40, "audio_token_offset": 56, "audio_config": _WAVES}
        | {"text_config": {"rope_parameters": _PLAIN_ROPE}}
        | {"vision_config": _CODES | {"attn_resolutions": [], "resolution": 16, "spatial_scale_factor": 2}},
        "codes",
    ),
    "aria": (_INDEX | {"projector_patch_to_query_dict": {16: 4}, "vision_config": _SQUARE}, "square"),
    "aya_vision": (_INDEX | {"vision_config": _SQUARE}, "square"),
    "cohere2_vision": (_ID | {"vision_config": _SQUARE}, "square"),
    "cohere_compass": (
        _QWEN
        | {"text_config": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}}}
        | {"vision_config": _DEEPSTACK},
        "grid 24",
    ),
    "cosmos3_edge": (
        _QWEN | _POSITIONS | {"projector_hidden_size": 48, "vision_config": _PATCHES | {"num_patches": 16}},
        "grid 12",
    ),
    "cosmos3_omni": (_QWEN | _POSITIONS | {"vision_config": _DEEPSTACK}, "grid 24"),
    "deepseek_ocr2": (
        _ID
        | {
            "text_config": {
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"] * 2,
            },
            "vision_config": {
                "encoder_config": {"layer_types": ["full_attention"] * 4},
                "sam_config": _SAM | {"image_size": 32, "downsample_channels": [24, 32]},
            },
        },
        "tiles-beside 144",
    ),
    "deepseek_vl": (_ID | {"vision_config": _SQUARE}, "square 16"),
    "deepseek_vl_hybrid": (
        _ID | {"vision_config": _SQUARE, "high_res_vision_config": _SAM | {"image_size": 64, "patch_size": 4}},
        "two-resolutions 16",
    ),
    "dots3_note": (
        _ID
        | _VIDEO
        | {
            "audio_token_id": 89,
            "text_config": {
                "num_key_value_heads": 4,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
                **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
            },
            "vision_config": {"patch_size": 2, "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_bias": False},
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        },
        "grid 12",
    ),
    "ernie4_5_vl_moe": (
        _GLM
        | {
            "text_config": {
                "rope_parameters": _ROPE,
                "moe_intermediate_size": [16, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
            },
            "vision_config": {"depth": 2, "patch_size": 2, "in_channels": 3},
        },
        "grid 12",
    ),
    "exaone4_5": (_ID | _VIDEO | {"vision_config": _WINDOWS}, "grid 24"),
    "fuyu": (_ID | {"patch_size": 4, "image_size": 16}, "patches"),
    "glm46v": (_GLM | {"text_config": {"rope_parameters": _HALF_ROPE}, "vision_config": _GLM_TOWER}, "grid 24"),
    "glm4v": (_GLM | {"text_config": {"rope_parameters": _HALF_ROPE}, "vision_config": _GLM_TOWER}, "grid 24"),
    "glm4v_moe": (_GLM | {"text_config": {"rope_parameters": _HALF_ROPE}, "vision_config": _GLM_TOWER}, "grid 24"),
    "glm5_next": (
        _GLM
        | {
            "text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 8},
            "vision_config": _GRID | {"image_size": 16, "projection_intermediate_size": 48},
        },
        "grid 24",
    ),
    "glm_ocr": (_GLM | _POSITIONS | {"vision_config": _GLM_TOWER}, "grid 24"),
    "glmga": (_GLM | {"text_config": {"rope_parameters": _HALF_ROPE}, "vision_config": _GLM_TOWER}, "grid 24"),
    "got_ocr2": (_INDEX | {"vision_config": _SAM | {"image_size": 32}}, "large-square 16"),
    "granite4_vision": (
        _INDEX
        | _PINPOINTS
        | {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "spatial_target_layers": [2, 3, 2, 3],
            "projector_dropout": 0.0,
            "vision_config": _SQUARE | {"hidden_size": 64},
        },
        "any-resolution",
    ),
    "granite_docling": (
        _ID
        | {
            "vision_config": _SQUARE
            | {
                "num_hidden_layers": 3,
                "out_hidden_size": 32,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0, 1],
                "use_fine_route": False,
            }
        },
        "tiles-in-a-row 4",
    ),
    "hunyuan_vl": (
        _ID
        | {
            "im_start_id": 87,
            "im_end_id": 88,
            "im_newline_id": 89,
            "text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 1, 1]}, "head_dim": 8},
            "vision_config": _NEWLINES | {"text_hidden_size": 32},
        },
        "newlines 2",
    ),
    "hy_v4_vl": (
        _ID
        | _VIDEO
        | {
            "text_config": {
                **dict.fromkeys(("qk_rope_head_dim", "head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
                "qk_head_dim": 16,
                "index_n_heads": 2,
                "rope_parameters": _ROPE,
            },
            "vision_config": _NEWLINES,
        },
        "newlines",
    ),
    "hyperclovax_vision_v2": (_ID | _VIDEO | {"vision_config": _WINDOWS}, "grid 24"),
    "idefics2": (
        _ID
        | {
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
                "hidden_size": 32,
            },
            "vision_config": _SQUARE,
        },
        "in-a-row 4",
    ),
    "idefics3": (_ID | {"scale_factor": 2, "vision_config": _SQUARE}, "in-a-row 4"),
    "inkling2": (
        _ID
        | {"vision_config": _PATCHES | {"text_hidden_size": 32, "posemb_grid_size": 8, "projection_hidden_dim": 48}},
        "grid 12",
    ),
    "inkling2_loop": (_ID | {"vision_config": _INKLING}, "grid 12"),
    "janus": (
        _ID
        | {
            "vision_config": _SQUARE | {"projection_dim": 32},
            "vq_config": _CODES
            | {
                "num_embeddings": 16,
                "num_patches": 4,
                "projection_dim": 8,
                "image_token_embed_dim": 16,
            },
        },
        "square 16",
    ),
    "kimi_k25": (
        _ID
        | _VIDEO
        | {
            "projection_hidden_size": 32,
            "vision_config": _PATCHES | {"projection_hidden_size": 32, "pos_emb_height": 8, "pos_emb_width": 8},
        },
        "square-grid 12",
    ),
    "lfm2_vl": (
        _ID
        | {
            "vision_config": _PATCHES | {"num_patches": 16},
            "text_config": {"layer_types": ["conv", "full_attention"] * 2},
        },
        "shapes",
    ),
    "lfm3_vl": (_QWEN | {"vision_config": {"patch_size": 2}}, "grid 24"),
    "lighton_ocr": (_ID | {"vision_config": _SIZED}, "sizes"),
    "llama4": (
        _INDEX
        | {
            "vision_config": _SQUARE
            | {
                "intermediate_size": 128,
                **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 48),
            }
        },
        "square",
    ),
    "llava": (_INDEX | {"image_seq_length": 16, "vision_config": _SQUARE}, "square 16"),
    "llava_next": (_INDEX | _PINPOINTS | {"vision_config": _TILES}, "any-resolution"),
    "llava_next_video": (
        _INDEX | _PINPOINTS | {"video_token_index": 91, "vision_config": _TILES},
        "any-resolution",
    ),
    "llava_onevision": (
        _INDEX | _PINPOINTS | {"video_token_index": 91, "vision_config": _TILES},
        "any-resolution-alone",
    ),
    "minicpm_ocr": (_ID | _VIDEO | _STRIPS, "strips 1"),
    "minicpmv4_6": (_ID | _VIDEO | _STRIPS, "strips 2"),
    "minicpmv4_7": (_ID | _VIDEO | _POSITIONS | _STRIPS, "strips 2"),
    "minimax_m3_vl": (_INDEX | {"video_token_index": 91, "vision_config": _PATCHES}, "grid 24"),
    "mistral_large4": (_INDEX | {"vision_config": _SIZED}, "sizes"),
    "molmo2": (
        {
            "image_patch_id": IMAGE,
            "vision_config": _SQUARE
            | {"image_size": [16, 16], "num_position_embeddings": 16, "num_key_value_heads": 4},
            "adapter_config": {"vision_feature_layer": [-1, 0], "text_hidden_size": 32, "num_key_value_heads": 4},
            "text_config": {"additional_vocab_size": 8},
        },
        "square",
    ),
    "muse_glimmer": (
        _ID
        | _VIDEO
        | {
            "out_hidden_size": 128,
            "projector_hidden_size": 48,
            "vision_config": {"patch_size": 2, "pos_emb_height": 8, "pos_emb_width": 8},
        },
        "grid 24",
    ),
    "muse_spark": (
        _ID
        | _VIDEO
        | {
            "audio_token_id": 89,
            "out_hidden_size": 128,
            "projector_hidden_size": 48,
            "text_config": {"moe_hidden_size": 32},
            "vision_config": {"patch_size": 2, "pos_emb_height": 8, "pos_emb_width": 8},
            "audio_config": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 32},
        },
        "grid 24",
    ),
    "nemotron_h_omni": (
        _ID
        | _VIDEO
        | {
            "audio_token_id": 89,
            "video_temporal_patch_size": 2,
            "projector_hidden_size": 48,
            "vision_hidden_size": 32,
            "vision_config": _PATCHES
            | {
                "video_temporal_patch_size": 2,
                "image_size": 16,
                "max_img_size": 32,
                "patch_dim": 12,
                "video_patch_dim": 24,
            },
        },
        "grid-without-time 12",
    ),
    "ovis2": (
        _ID
        | {
            "hidden_size": 32,
            "vocab_size": miniature.VOCABULARY,
            "vision_config": _SQUARE | {"hidden_stride": 2},
            "visual_indicator_token_ids": [INDICATORS[0], INDICATORS[1], 83, 84, 85],
        },
        "indicated 4",
    ),
    "paddleocr_vl": (_QWEN | _POSITIONS | {"vision_config": _SIZED | {"image_size": 16}}, "square-grid 12"),
    "pp_chart2table": (_INDEX | {"vision_config": _SAM | {"image_size": 32}}, "large-square 16"),
    "qianfan_ocr": (
        _ID | {"image_seq_length": 4, "vision_config": _SQUARE | {"image_size": [16, 16], "patch_size": [4, 4]}},
        "square",
    ),
    "qwen2_5_omni_thinker": (
        _POSITIONS
        | {
            "image_token_index": IMAGE,
            "video_token_index": 91,
            "audio_token_index": 89,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "vision_config": _WINDOWS,
        },
        "grid 24",
    ),
    "qwen3_5_moe": (_QWEN | _POSITIONS | {"vision_config": _QWEN3_TOWER}, "grid 24"),
    "qwen3_omni_moe_thinker": (_QWEN | _POSITIONS | {"audio_token_id": 89, "vision_config": _DEEPSTACK}, "grid 24"),
    "qwen3_vl_moe": (_QWEN | _POSITIONS | {"vision_config": _DEEPSTACK}, "grid 24"),
    "qwen4_exp": (
        _QWEN
        | {
            "text_config": {
                "rope_parameters": _ROPE,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
                "ngram_vocab_size_base": 64,
            },
            "vision_config": _QWEN3_TOWER,
        },
        "grid 24",
    ),
    "shieldgemma2": (_INDEX | {"mm_tokens_per_image": 4, "vision_config": _SQUARE}, "square"),
    "smolvlm": (_ID | {"scale_factor": 2, "vision_config": _SQUARE}, "in-a-row 4"),
    "step3p7": (
        _ID
        | {
            "text_config": {
                "sliding_window": miniature.WINDOW,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
            },
            "vision_config": _SQUARE | {"image_size": 32, "intermediate_size": 48, "mlp_ratio": 1.5},
        },
        "tiles-beside 4",
    ),
    "video_llama_3": (_ID | _VIDEO | {"vision_config": _PATCHES}, "merge-sizes 12"),
    "video_llava": (
        _INDEX | {"video_token_index": 91, "image_seq_length": 16, "vision_config": _SQUARE},
        "square 16",
    ),
    "vipllava": (
        _INDEX | {"image_seq_length": 16, "vision_feature_layers": [-1, -2], "vision_config": _SQUARE},
        "square 16",
    ),
}


def family_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """In evaluation mode; the same weights each time."""
    changes = MORE_FAMILIES[family][0] if family in MORE_FAMILIES else {}
    model = miniature.random_causal_lm(
        config_of(family, **changes),
        seed,
        kind=AutoModelForImageTextToText,
        attn_implementation="eager",
        **EAGER_EXPERTS,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than those of the miniature, so that images matter
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()
