"""A tiny config of any causal family that transformers knows, from nothing but its config class.

Sizes are those of `dta_plugin.cli.miniature`. What names do not tell is stated here.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dta_plugin.cli import miniature
from dta_plugin.cli.miniature import LAYERS, small_sizes
from tests.support.models import EAGER_EXPERTS, WINDOW

NAMES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Options of a second model of each family, where its config has them: what is off in its default config.
_OPTIONS: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), True),
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "use_qkv_bias", "attention_out_bias"), True),
    **dict.fromkeys(("logit_scale", "lm_head_multiplier"), 0.7),
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "residual_multiplier", "key_multiplier"), 1.3),
    "attention_multiplier": 0.5,
    "clip_qkv": 1.0,
    **dict.fromkeys(("attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block", "mup_enabled"), True),
}

# What names and lengths do not tell.
_MAMBA_HEADS = {"num_heads": 8, "head_dim": 8}
_GEMMA4_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "global_head_dim": 16}
_BLT: dict[str, Any] = {"hidden_size": 32, "hidden_size_global": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_BYTES = {"vocab_size": 260}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": LAYERS}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 64,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
    **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
}
_ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16}
_WITH_OPTIONS = "with options"
_OWN: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": _BLT | _BYTES,
        "decoder_config": _BLT | _BYTES,
        "patcher_config": _BLT | _BYTES,
        "global_config": _BLT,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 1.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_bias": False},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {"intermediate_size": [48, 32, 48, 64]},
    "gemma4": {"text_config": _GEMMA4_EXPERTS},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "gemma4_text": _GEMMA4_EXPERTS,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        _WITH_OPTIONS: {"layer_types": ["full_attention"] * LAYERS, "position_embedding_type": "rope"},
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": _MAMBA_HEADS,
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "olmoe": {_WITH_OPTIONS: {"sliding_window": WINDOW}},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {_WITH_OPTIONS: {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
}


def config_of(name: str, options: bool = False, **changes: Any) -> PretrainedConfig:
    """A tiny config of the family. options: with the features that are off by default."""
    return _small(CONFIG_MAPPING[name], _OWN.get(name, {}) | changes, options)


def options_of(name: str) -> list[str]:
    """The settings in which `config_of(name, options=True)` differs."""
    plain, more = (config_of(name, options).get_text_config(decoder=True).to_dict() for options in (False, True))
    return [key for key, value in more.items() if plain.get(key) != value]


def _small(kind: type[PretrainedConfig], own: dict[str, Any], options: bool) -> PretrainedConfig:
    default = kind()
    stated = default.to_dict()
    changes = small_sizes(stated)
    if options:
        changes |= {name: value for name, value in _OPTIONS.items() if name in stated}
        if "sliding_window" in stated and set(changes.get("layer_types", [])) == {"full_attention"}:
            changes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    for name, sub in default.sub_configs.items():
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(sub, type):
            changes[name] = _small(type(part), own.get(name, {}), options)
    changes |= {name: value for name, value in own.items() if name not in (*default.sub_configs, _WITH_OPTIONS)}
    return kind(**(changes | (own.get(_WITH_OPTIONS, {}) if options else {})))


def random_causal_lm(config: PretrainedConfig, seed: int = 0, **kind: Any) -> PreTrainedModel:
    """In training mode and float32, with experts that float64 can run; the same arguments give the same weights."""
    return miniature.random_causal_lm(config, seed, **kind, **EAGER_EXPERTS)
