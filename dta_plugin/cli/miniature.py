"""A tiny model with a given model's own config: every size small, everything else as it is stated.

Sizes are recognised by their names, lists with an entry per layer are cut to a few layers that show every kind of
layer, dropout rates become 0. The window, where there is one, is shorter than what a model is probed with. Every
parameter is random, norms, biases and sinks included, because defaults hide faults.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dta_plugin.cli.model_loading import auto_class

WINDOW = 5
VOCABULARY = 96
LAYERS = 4

# Not more than stated, because classes may demand one.
_AT_MOST = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

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
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), LAYERS),
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
    **dict.fromkeys(_AT_MOST, 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "n_layers_per_attn_res_block"), 1),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "indexer_head_dim", "laurel_rank", "gated_norm_rank"), 4),
    "hidden_size_per_layer_input": 4,
    **dict.fromkeys(("index_topk_blocks", "index_block_size"), 2),
    **dict.fromkeys(("num_kv_shared_layers", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_headdim", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("n_groups", "mamba_ngroups", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    "local_attention": WINDOW,
    "attention_chunk_size": 256,  # rows longer than a range of positions do not stream
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


def miniature(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM of `miniature_config`, in evaluation mode and float32. Raises whatever the model class raises."""
    return random_causal_lm(miniature_config(config), kind=auto_class(config)).eval()


def miniature_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config with small sizes."""
    stated = config.to_dict()
    changes = small_sizes(stated)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            changes[name] = miniature_config(part).to_dict()
    small: PretrainedConfig = type(config).from_dict(stated | changes)
    small._attn_implementation = config._attn_implementation
    return small


def small_sizes(stated: dict[str, Any]) -> dict[str, Any]:
    """What a config of these settings has to change to be small."""
    changes = {name: value for name, value in _SIZES.items() if stated.get(name) is not None}
    changes |= {name: min(changes[name], stated[name]) for name in _AT_MOST if name in changes}
    changes |= {name: 0.0 for name, value in stated.items() if _is_random(name) and isinstance(value, float)}
    changes |= _LATENT if "qk_rope_head_dim" in stated else {}
    return changes | _per_layer(stated)


def _is_random(name: str) -> bool:
    return "dropout" in name or name.endswith(("pdrop", "layerdrop", "dropout_prob", "jitter_noise"))


def _per_layer(stated: dict[str, Any]) -> dict[str, list[Any]]:
    """Lists with an entry per layer, cut to the first layer of every kind, in turns."""
    count = next((stated[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if stated.get(n)), None)
    lists = {name: value for name, value in stated.items() if isinstance(value, list) and len(value) == count}
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({str(kind): index for index, kind in reversed(list(enumerate(kinds)))}.values())
    kept = (first * LAYERS)[:LAYERS]
    return {name: [value[index] for index in kept] for name, value in lists.items()}


def random_causal_lm(
    config: PretrainedConfig, seed: int = 0, kind: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """In training mode and float32; the same config and seed give the same weights.

    kind: which of transformers' classes for models of any family. options: of the model's class.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
                else:
                    parameter += (1.0 if name.endswith("sinks") else 0.2) * torch.randn(parameter.shape)
    return model.train()
