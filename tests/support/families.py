"""A tiny random model of any causal family that transformers knows, built from nothing but its config class.

Sizes are recognised by their names and made small, lists with an entry per layer are cut to a few layers that show
every kind of layer, dropout rates become 0. Every parameter is random, norms, biases and sinks included. The window of
families that have one is shorter than the sequences of the sweep (tests/support/sweep.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.models import EAGER_EXPERTS, WINDOW

NAMES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
_LAYERS = 4

# What a size is called -> what it becomes, wherever a config has it and it is not None.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "pronunciation_embed_dim"), 32),
    **dict.fromkeys(("shape_embed_dim", "cross_attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "dff", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "attention_head_size", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("global_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "n_layers_per_attn_res_block"), 1),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "indexer_head_dim", "laurel_rank", "gated_norm_rank"), 4),
    "hidden_size_per_layer_input": 4,
    **dict.fromkeys(("index_topk", "index_topk_blocks", "index_block_size"), 2),
    **dict.fromkeys(("num_kv_shared_layers", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_headdim", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("n_groups", "mamba_ngroups", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "local_attention"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 256),
    "rel_extent": 32,
    **dict.fromkeys(("d_rel", "loop_gate_rank", "adapter_rank"), 4),
    **dict.fromkeys(("image_size", "patch_size", "num_mel_bins"), 16),
    **dict.fromkeys(("unpadded_vocab_size", "decoder_vocab_size", "audio_vocab_size"), VOCABULARY),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"), 4.0),
    **dict.fromkeys(("is_decoder", "causal"), True),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# With latent attention, the head dim is that of the rotary part, and every head has a key.
_LATENT = {"head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": 4}

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
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": _LAYERS}
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
        _WITH_OPTIONS: {"layer_types": ["full_attention"] * _LAYERS, "position_embedding_type": "rope"},
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
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(name: str, options: bool = False) -> PretrainedConfig:
    """A tiny config of the family. options: with the features that are off by default."""
    return _small(CONFIG_MAPPING[name], _OWN.get(name, {}), options)


def options_of(name: str) -> list[str]:
    """The settings in which `config_of(name, options=True)` differs."""
    plain, more = (config_of(name, options).get_text_config(decoder=True).to_dict() for options in (False, True))
    return [key for key, value in more.items() if plain.get(key) != value]


def _small(kind: type[PretrainedConfig], own: dict[str, Any], options: bool) -> PretrainedConfig:
    default = kind()
    stated = default.to_dict()
    changes = {name: value for name, value in _SIZES.items() if stated.get(name) is not None}
    changes |= {name: 0.0 for name, value in stated.items() if _is_random(name) and isinstance(value, float)}
    changes |= _LATENT if "qk_rope_head_dim" in stated else {}
    changes |= _per_layer(stated)
    if options:
        changes |= {name: value for name, value in _OPTIONS.items() if name in stated}
        if "sliding_window" in stated and set(changes.get("layer_types", [])) == {"full_attention"}:
            changes["layer_types"] = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
    for name, sub in default.sub_configs.items():
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(sub, type):
            changes[name] = _small(type(part), own.get(name, {}), options)
    changes |= {name: value for name, value in own.items() if name not in (*default.sub_configs, _WITH_OPTIONS)}
    return kind(**(changes | (own.get(_WITH_OPTIONS, {}) if options else {})))


def _is_random(name: str) -> bool:
    return "dropout" in name or name.endswith(("pdrop", "layerdrop", "dropout_prob", "jitter_noise"))


def _per_layer(stated: dict[str, Any]) -> dict[str, list[Any]]:
    """Lists with an entry per layer, cut to the first layer of every kind, in turns."""
    count = next((stated[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if stated.get(n)), None)
    lists = {name: value for name, value in stated.items() if isinstance(value, list) and len(value) == count}
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({str(kind): index for index, kind in reversed(list(enumerate(kinds)))}.values())
    kept = (first * _LAYERS)[:_LAYERS]
    return {name: [value[index] for index in kept] for name, value in lists.items()}


def random_causal_lm(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """In training mode and float32; the same config and seed give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **EAGER_EXPERTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
                else:
                    parameter += (1.0 if name.endswith("sinks") else 0.2) * torch.randn(parameter.shape)
    return model.train()
