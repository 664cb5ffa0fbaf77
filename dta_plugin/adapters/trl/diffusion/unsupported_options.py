"""Options and arguments of GRPOTrainer without a meaning for a diffusion LM: set, they raise."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from trl import GRPOConfig

from dta_plugin.errors import InvalidInputError

_TOKEN_RATIOS = "there are no left-to-right token ratios; `objective` says what is maximised"
_ENTROPY = "a diffusion LM has no next-token entropy"
_SAMPLER = "the block sampler does not use it; temperature, remasking, diffusion_steps and block_length shape sampling"
_ENGINE = "completions come from the block sampler, on the training model itself"
_HEAD = "the ELBO's LM head runs tile by tile, its softmax in float32 anyway"

_OPTIONS = {
    "use_vllm": _ENGINE,
    "use_transformers_continuous_batching": _ENGINE,
    "use_transformers_paged": _ENGINE,
    "cache_implementation": _ENGINE,
    "generation_kwargs": _SAMPLER,
    "top_p": _SAMPLER,
    "top_k": _SAMPLER,
    "min_p": _SAMPLER,
    "repetition_penalty": _SAMPLER,
    "loss_type": _TOKEN_RATIOS,
    "importance_sampling_level": _TOKEN_RATIOS,
    "epsilon_high": _TOKEN_RATIOS,
    "delta": _TOKEN_RATIOS,
    "off_policy_mask_threshold": _TOKEN_RATIOS,
    "use_bias_correction_kl": _TOKEN_RATIOS,
    "top_entropy_quantile": _ENTROPY,
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "use_liger_kernel": _HEAD,
    "cast_lm_head_to_fp32": _HEAD,
    "router_aux_loss_coef": "mixtures of experts are not supported",
    "sync_ref_model": "the reference stays the initial policy",
    "max_tool_calling_iterations": "completions are written in one turn",
    "deepspeed": "it would average one backward pass per ELBO sample wrongly; use DDP, or FSDP with fsdp_version 2",
}
_ARGUMENTS = ("tools", "rollout_func", "environment_factory")
_UPDATING_OPTIMIZERS = ("lomo", "adalomo")


def check_options(config: GRPOConfig) -> None:
    """Raise InvalidInputError for an option that is not at TRL's default and would have no effect."""
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    for name, reason in _OPTIONS.items():
        if name in defaults and getattr(config, name) != defaults[name]:
            raise InvalidInputError(
                f"{name}={getattr(config, name)!r} for a diffusion LM: {reason}. Expected {name}="
                f"{defaults[name]!r}; leave it out."
            )
    if str(getattr(config.optim, "value", config.optim)) in _UPDATING_OPTIMIZERS:
        raise InvalidInputError(
            f"optim={config.optim!r} updates weights during the backward pass. Expected an optimizer that steps after "
            "all samples' backward passes, such as adamw_torch."
        )


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise InvalidInputError for an argument of GRPOTrainer that a diffusion LM cannot serve."""
    given = [name for name in _ARGUMENTS if arguments.get(name)]
    if given:
        raise InvalidInputError(
            f"Got {', '.join(given)}. Expected none of {', '.join(_ARGUMENTS)}: a diffusion LM writes its completion "
            "in one turn, by the block sampler; leave them out."
        )
