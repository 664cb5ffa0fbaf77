"""The contract with TRL and transformers: every name of theirs that the adapter relies on beyond documented interfaces.

`check` looks at classes and functions; it runs when the package is imported and when the plugin is switched on. The
others look at a trainer that has been built, once each, for what only instances have.
"""

from __future__ import annotations

from dta_plugin.adapters.contract import Name, require, require_attributes
from dta_plugin.adapters.releases import TRANSFORMERS, TRL, say_if_untested, supported_release

HOOK = "_get_per_token_logps_and_entropies"
PREPARE = "_prepare_inputs"
# All that TRL 1.0 to 1.16 calls between its buffer and the gradient; no release has all of them.
LOSS = (
    "training_step",
    PREPARE,
    "compute_loss",
    "_compute_loss",
    "compute_liger_loss",
    HOOK,
    "get_high_entropy_mask",
    "get_off_policy_mask",
    "get_gamma_weights",
)
# What the hook calls, in TRL 1.14: a tree runs in place of all of it.
SCORING = (HOOK, "_chunked_logps", "_full_logits_logps")

_ROWS = ("model", "input_ids", "attention_mask", "logits_to_keep")


def _of_both(method: str, *parameters: str, is_own: bool = False) -> tuple[Name, Name]:
    return Name(f"trl:GRPOTrainer.{method}", parameters, is_own), Name(f"trl:RLOOTrainer.{method}", parameters, is_own)


_NAMES = (
    *_of_both(HOOK, *_ROWS, "compute_entropy", is_own=True),
    *_of_both(PREPARE, "generation_batch", is_own=True),
    *_of_both("_compute_loss"),
    Name("transformers:Trainer.train"),
    Name("transformers:Trainer._get_train_sampler", is_own=True),
    Name("transformers:Trainer._defer_fsdp_gradient_reduction", is_optional=True),
    Name("torch.autograd:Variable._execution_engine.queue_callback"),
)
_OF_SCORERS = (
    Name(f"trl:GRPOTrainer.{HOOK}", (*_ROWS, "compute_entropy")),
    Name(
        "trl.trainer.utils:add_fused_lm_head",  # TRL 1.15
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        is_optional=True,
    ),
)
_OF_DIFFUSION = (
    Name(f"trl:GRPOTrainer.{HOOK}", (*_ROWS, "batch_size")),
    Name("trl:GRPOTrainer._generate_single_turn", ("prompt_ids", "images")),
    Name("trl:GRPOTrainer._generate_and_score_completions", ("inputs",)),
    Name("trl:GRPOTrainer._compute_loss", ("model", "inputs")),
    Name("trl.models.utils:prepare_fsdp", ("model", "accelerator")),
    Name("trl.models.utils:disable_gradient_checkpointing", ("model", "gradient_checkpointing_kwargs")),
)
ASYNC = "trl.experimental.async_grpo.async_grpo_trainer"
_OF_ASYNC = (
    Name(f"{ASYNC}:AsyncGRPOTrainer.__init__", ("args",), is_own=True),
    Name(f"{ASYNC}:AsyncGRPOTrainer.compute_loss", ("model", "inputs"), is_own=True),
    Name(f"{ASYNC}:AsyncGRPOTrainer._log_step_metrics", is_own=True),
    Name(f"{ASYNC}:TREE_ATTENTION"),
    Name(f"{ASYNC}:create_model_from_path"),
    Name(f"{ASYNC}:add_fused_lm_head", ("model",)),
    Name(f"{ASYNC}:get_peak_flops_per_device", ("accelerator", "dtype")),
    Name(f"{ASYNC}:compute_flops_per_token", ("config", "seq_len")),
)

# Attributes of trainers, with the TRL release that they came with.
_ONLINE = {"_buffered_inputs": "1.0.0", "_metrics": "1.0.0", "_step": "1.0.0", "temperature": "1.0.0"}
_ROUTER_LOSS = {"aux_loss_enabled": "1.7.0"}
_LOSS_OF_GRPO = {
    "beta": "1.0.0",
    "loss_type": "1.0.0",
    "importance_sampling_level": "1.0.0",
    "off_policy_mask_threshold": "1.0.0",
    "top_entropy_quantile": "1.0.0",
    "use_adaptive_entropy": "1.8.0",
    "_entropy_bonus_enabled": "1.8.0",
}
_DIFFUSION = {
    "_buffered_inputs": "1.0.0",
    "_metrics": "1.0.0",
    "_step": "1.0.0",
    "num_iterations": "1.0.0",
    "mask_truncated_completions": "1.0.0",
    "is_fsdp_enabled": "1.0.0",
    "eos_token_ids": "1.14.2",
}
_ASYNC = {"_metrics": "1.16.0", "temperature": "1.16.0", "aux_loss_enabled": "1.16.0"}
_OFFLINE = {"_train_batch_size": "4.57"}


def say_what_is_untested() -> None:
    """One line, once in a process, where TRL or transformers is newer than what was tested."""
    say_if_untested(TRL, TRANSFORMERS)


def check() -> None:
    """Raises UnsupportedError for a TRL release that is not supported, and where a name is not as it was."""
    supported_release(TRL)
    require(_NAMES)


def check_scorer() -> None:
    """The same for what `dense` needs."""
    require(_OF_SCORERS)


def check_diffusion() -> None:
    """The same for what the trainer of diffusion LMs needs."""
    say_what_is_untested()
    require(_OF_DIFFUSION)


def check_async() -> None:
    """The same for what the asynchronous trainer needs."""
    say_what_is_untested()
    require(_OF_ASYNC)


def check_trainer(trainer: object) -> None:
    """Raises UnsupportedError for a GRPO or RLOO trainer without what the plugin's hooks read of it."""
    from trl import GRPOTrainer, RLOOTrainer

    say_what_is_untested()
    require_attributes(trainer, _ONLINE, "trl")
    if isinstance(trainer, GRPOTrainer):
        require_attributes(trainer, _LOSS_OF_GRPO, "trl")
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        require_attributes(trainer, _ROUTER_LOSS, "trl")


def check_diffusion_trainer(trainer: object) -> None:
    """The same for a trainer of diffusion LMs."""
    require_attributes(trainer, _DIFFUSION, "trl")


def check_async_trainer(trainer: object) -> None:
    """The same for an asynchronous trainer."""
    require_attributes(trainer, _ASYNC, "trl")


def check_offline_trainer(trainer: object) -> None:
    """The same for a trainer whose batches are made of siblings."""
    say_what_is_untested()
    require_attributes(trainer, _OFFLINE, "transformers")
