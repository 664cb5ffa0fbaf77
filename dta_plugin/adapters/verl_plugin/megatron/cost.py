"""What a token, a visible pair and a scored row cost in a Megatron model, in FLOPs: of the whole model, on any rank."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.utils import is_layer_window_attention

from dta_plugin.tree.cost import ModelCost


def model_cost(config: Any, vocabulary: int) -> ModelCost:
    """config: Megatron's TransformerConfig. Experts count as often as a token is sent to one."""
    width, heads = config.hidden_size, config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    matrices = 3 if config.gated_linear_unit else 2
    inner = config.ffn_hidden_size
    if config.num_moe_experts:
        inner = config.moe_router_topk * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
        inner += config.moe_shared_expert_intermediate_size or 0
    layers = range(1, config.num_layers + 1)
    windowed = sum(is_layer_window_attention(config.window_size, config.window_attn_skip_freq, n) for n in layers)
    per_pair = 4.0 * heads
    return ModelCost(
        per_token=2.0 * config.num_layers * width * (2 * heads + 2 * keys + matrices * inner),
        per_pair=per_pair * (config.num_layers - windowed),
        per_scored=2.0 * width * vocabulary,
        per_window_pair=((config.window_size[0] + 1, per_pair * windowed),) if windowed else (),
    )
