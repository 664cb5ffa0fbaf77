"""What in verl's Megatron engine, its model or a batch a tree cannot follow: a reason with the setting and the remedy.

All ranks agree on it before a mini-batch runs (`mini_batch.decide`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import nn
from verl.utils.megatron_utils import unwrap_model

_MEGATRON = "actor_rollout_ref.actor.megatron"
_OVERRIDE = f"+{_MEGATRON}.override_transformer_config"
# Of Megatron's TransformerConfig: name, what it must be, why, and the remedy, as far as it is another one.
_SETTINGS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("context_parallel_size", (1,), "context parallelism cuts rows across ranks; a tree needs far fewer tokens"),
    ("multi_latent_attention", (False,), "multi-latent attention (MLA) is not covered"),
    ("mtp_num_layers", (None, 0), "multi-token prediction (MTP) reads further tokens of a row"),
    ("experimental_attention_variant", (None,), "layers with recurrent states or sparse attention are not covered"),
    ("fp8", (None, False), "fp8 scales by what is in a batch"),
    ("fp4", (None, False), "fp4 scales by what is in a batch"),
    ("moe_enable_routing_replay", (False,), "router replay records routes per row"),
    ("attention_dropout", (0, None), "dropout differs between rows that share a token"),
    ("hidden_dropout", (0, None), "dropout differs between rows that share a token"),
    ("softmax_type", ("vanilla",), "attention sinks are not covered"),
    ("apply_query_key_layer_scaling", (False,), "scores that are scaled by layer are not covered"),
    ("mrope_section", (None,), "positions of images (mRoPE) are not covered; train on text models"),
    ("fused_single_qkv_rope", (False,), "this fusion takes no packed rows"),
    ("log_max_attention_logit", (False,), "the largest attention logit is not recorded along trees"),
    ("moe_z_loss_coeff", (None, 0), "the router's z-loss is a mean over tokens, of which a tree has fewer"),
    ("moe_expert_capacity_factor", (None,), "which tokens an expert drops depends on all tokens of a batch"),
    ("moe_router_enable_expert_bias", (False,), "the router's bias moves with the tokens of a batch"),
    ("moe_router_force_load_balancing", (False,), "routing is random"),
    ("moe_input_jitter_eps", (None,), "the router's input is random"),
    ("cuda_graph_impl", ("none",), "CUDA graphs hold one shape, and trees have many"),
    ("enable_cuda_graph", (False,), "CUDA graphs hold one shape, and trees have many"),
    ("overlap_moe_expert_parallel_comm", (False,), "its schedule does not call the model's own forward"),
    ("fine_grained_activation_offloading", (False,), "activation offloading has not been tried with trees"),
    ("cpu_offloading", (False,), "activation offloading has not been tried with trees"),
    ("defer_embedding_wgrad_compute", (False,), "the head runs on scored rows only, which a deferred gradient misses"),
)


def engine_obstacle(engine: Any) -> str | None:
    """What in an engine that has been initialised rules trees out, on this rank, or None."""
    config = engine.engine_config
    if config.context_parallel_size > 1 or config.dynamic_context_parallel:
        return (
            f"context parallelism cuts rows across ranks (context_parallel_size={config.context_parallel_size}, "
            f"dynamic_context_parallel={config.dynamic_context_parallel}); set {_MEGATRON}.context_parallel_size=1 (a "
            "tree needs far fewer tokens)"
        )
    if config.router_replay.mode != "disabled":
        return f"router replay records routes per row; set {_MEGATRON}.router_replay.mode=disabled"
    if engine.model_config.mtp.enable:
        return (
            "multi-token prediction (MTP) reads further tokens of a row; set actor_rollout_ref.model.mtp.enable=False"
        )
    if config.use_fused_kernels:
        return "fused kernels replace the model's forward; set actor_rollout_ref.model.use_fused_kernels=False"
    if engine._qat_enabled:
        return "quantisation-aware training scales by what is in a batch; set its `enable` to False"
    if config.use_megatron_fsdp:
        return f"Megatron-FSDP has not been tried with trees; set {_MEGATRON}.use_megatron_fsdp=False"
    reasons = (model_obstacle(unwrap_model(chunk), engine.tf_config) for chunk in engine.module)
    return next((reason for reason in reasons if reason is not None), None)


def model_obstacle(model: Any, config: Any) -> str | None:
    """The same of one stage, or chunk of one, unwrapped. config: Megatron's TransformerConfig."""
    for name, allowed, reason in _SETTINGS:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            return f"{name}={value}: {reason}; set {_OVERRIDE}.{name}={_in_yaml(allowed[0])}, or train without trees"
    if (of_experts := _router_loss(config) or _gradients_of_experts(config)) is not None:
        return of_experts
    if type(model) is not GPTModel:
        return f"the model is a {type(model).__name__}; only Megatron's GPTModel is covered, no images, no state spaces"
    if model.position_embedding_type not in ("rope", "yarn", "learned_absolute", "none"):
        return f"positions of type {model.position_embedding_type} are not covered"
    if model.post_process and type(model.output_layer) is not ColumnParallelLinear:
        return f"the head is a {type(model.output_layer).__name__}; expected Megatron's ColumnParallelLinear"
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            return (
                f"dropout differs between rows that share a token, and {name} has p={part.p}; set "
                "actor_rollout_ref.model.lora.dropout=0.0 where that is an adapter's"
            )
    for layer in model.decoder.layers:
        attention = getattr(layer, "self_attention", None)
        if type(attention) is not SelfAttention:
            return (
                f"layer {layer.layer_number} attends by {type(attention).__name__}; only Megatron's SelfAttention is "
                "covered, no multi-latent attention (MLA) and no recurrent layers"
            )
    return None


def _router_loss(config: Any) -> str | None:
    """Load-balancing losses are means over a batch's tokens; verl's default for RL is to have none."""
    if not config.num_moe_experts or config.moe_router_load_balancing_type in ("none", ["none"]):
        return None
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    weights = coefficients if isinstance(coefficients, list) else [coefficients]
    if "sinkhorn" not in kinds and not any(weights):
        return None
    return (
        f"moe_router_load_balancing_type={kinds} with moe_aux_loss_coeff={coefficients} balances over all tokens of a "
        f"batch, of which a tree has fewer; set {_OVERRIDE}.moe_router_load_balancing_type=none, verl's default"
    )


def _gradients_of_experts(config: Any) -> str | None:
    """Such experts have gradients of the tokens of one tensor-parallel rank: Megatron-Core adds up none of others."""
    shared, whole = config.tensor_model_parallel_size, config.expert_tensor_parallel_size
    if not config.num_moe_experts or config.expert_model_parallel_size > 1 or whole in (None, shared):
        return None
    return (
        f"expert_tensor_parallel_size={whole} with tensor_model_parallel_size={shared} and no expert parallelism: "
        "Megatron does not add up experts' gradients over tensor-parallel ranks, so an update depends on which tokens "
        f"are on which of them; set {_MEGATRON}.expert_tensor_parallel_size=null, or expert_model_parallel_size above 1"
    )


def _in_yaml(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))
