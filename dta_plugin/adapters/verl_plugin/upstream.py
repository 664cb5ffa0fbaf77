"""The contract with verl: every name of verl's that the adapter relies on. None is a documented interface.

Classes and functions are checked when verl has imported what the plugin extends, before it does so; an engine, a worker
and a trainer, which have attributes only once they have been built, when the plugin first meets them.
"""

from __future__ import annotations

from types import ModuleType

from dta_plugin.adapters.contract import Name, require, require_attributes
from dta_plugin.adapters.releases import MEGATRON_CORE, say_if_untested, supported_release

ENGINE = "verl.workers.engine.fsdp.transformer_impl"
MEGATRON_ENGINE = "verl.workers.engine.megatron.transformer_impl"
WORKERS = "verl.workers.engine_workers"
# Modules and classes of the trainers whose batches are balanced: v1, and v0, which verl means to drop.
V1, V0 = "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.ray_trainer"
SEPARATE = "verl.experimental.separation.ray_trainer"
TRAINERS = {V1: "PPOTrainer", V0: "RayPPOTrainer"}
# The same of trainers, `one_step_off_policy` and `fully_async_policy` included, with the method of each that runs
# before workers are started.
BEFORE_MODELS = {
    V1: ("PPOTrainer", "_init_resource_pool_mgr"),
    V0: ("RayPPOTrainer", "init_workers"),
    SEPARATE: ("SeparateRayPPOTrainer", "_init_resource_pools"),
}

_LM = f"{ENGINE}:FSDPEngineWithLMHead"
_OF_ENGINES = (
    Name("verl.workers.engine.base:EngineRegistry.register", ("model_type", "backend", "device")),
    Name("verl.workers.engine.base:EngineRegistry._engines"),
    Name(f"{_LM}.initialize"),
    Name(f"{_LM}._build_fsdp_module", ("module",)),
    Name(f"{_LM}.forward_backward_batch", ("data", "loss_function", "forward_only")),
    Name(f"{_LM}.forward_step", ("micro_batch", "loss_function", "forward_only")),
    Name(f"{_LM}.prepare_model_inputs", ("micro_batch",)),
    Name(f"{_LM}.prepare_model_outputs", ("output",)),
    Name(f"{_LM}._gradient_sync_context", ("is_last_micro_batch",), is_optional=True),  # verl 0.9, for diffusion LMs
    Name(f"{_LM}.get_data_parallel_rank"),
    Name(f"{_LM}.get_data_parallel_size"),
    Name(f"{_LM}.get_data_parallel_group"),
    Name(f"{ENGINE}:FSDPEngineWithValueHead.prepare_model_outputs", ("output",)),
    Name(f"{ENGINE}:prepare_micro_batches", ("data",)),
    Name(f"{ENGINE}:apply_monkey_patch", ("model",)),
    Name("verl.workers.utils.losses:value_loss", ("config", "data")),
    Name("verl.workers.utils.losses:ppo_loss", ("config", "data")),
    Name("verl.workers.utils.losses:sft_loss", ("config", "data")),
    Name("verl.workers.utils.losses:agg_loss", ("loss_mat", "loss_mask")),
    Name("verl.trainer.ppo.core_algos:agg_loss", ("loss_mat", "loss_mask")),
    Name("verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY"),
    Name("verl.utils.torch_functional:masked_mean", ("values", "mask")),
    Name("verl.utils.tensordict_utils:get_non_tensor_data"),
    Name("verl.utils.tensordict_utils:assign_non_tensor_data"),
    Name("verl.utils.tensordict_utils:index_select_tensor_dict"),
    Name("verl.utils.metric:Metric"),
    Name("verl.utils.metric:AggregationType"),
    Name("verl.utils.device:get_device_id"),
    Name("verl.utils.device:get_device_name"),
    Name("verl.utils.device:get_vendor", is_optional=True),  # verl 0.9
)
_MEGATRON_LM = f"{MEGATRON_ENGINE}:MegatronEngineWithLMHead"
_GPT = "megatron.core.models.gpt.gpt_model:GPTModel"
_OF_MEGATRON = (
    Name("verl.utils.device:get_vendor"),  # verl 0.9, the first that was tried
    Name(f"{_MEGATRON_LM}.initialize"),
    Name(f"{_MEGATRON_LM}.forward_backward_batch", ("data", "loss_function", "forward_only")),
    Name(
        f"{_MEGATRON_LM}.forward_step",
        ("batch_iter", "model", "logits_processor_func", "postprocess_micro_batch_func"),
    ),
    Name(f"{_MEGATRON_LM}.postprocess_micro_batch_func", ("output", "data", "forward_only", "loss_function")),
    Name(f"{MEGATRON_ENGINE}:prepare_micro_batches", ("data",)),
    Name("verl.utils.megatron_utils:unwrap_model"),
    Name("verl.utils.megatron.tensor_parallel:vocab_parallel_entropy", ("vocab_parallel_logits",)),
    Name(
        "verl.utils.megatron.tensor_parallel:vocab_parallel_entropy_with_chunking",
        ("vocab_parallel_logits", "chunk_size"),
    ),
    Name("verl.utils.megatron.tensor_parallel:vocab_parallel_log_probs_from_logits", ("logits", "labels")),
    Name(f"{_GPT}._preprocess", ("packed_seq_params",)),
    Name(f"{_GPT}._postprocess", ("hidden_states", "packed_seq_params")),
    Name(f"{_GPT}.forward", ("input_ids", "position_ids", "attention_mask", "packed_seq_params")),
    Name("megatron.core.transformer.attention:SelfAttention.forward", ("packed_seq_params",)),
    Name(
        "megatron.core.transformer.utils:is_layer_window_attention",
        ("window_size", "window_attn_skip_freq", "layer_number"),
    ),
    Name(
        "megatron.core.tensor_parallel.mappings:gather_from_sequence_parallel_region",
        ("tensor_parallel_output_grad", "group"),
    ),
    Name("megatron.core.parallel_state:get_virtual_pipeline_model_parallel_world_size"),
)
_OF_WORKERS = (
    Name(f"{WORKERS}:ActorRolloutRefWorker.set_dispatch_collect"),
    Name(f"{WORKERS}:TrainingWorker.train_batch", ("data",)),
)

# Attributes, with the release of verl that they came with.
_ENGINE = {
    "module": "0.8.0",
    "rank": "0.8.0",
    "engine_config": "0.8.0",
    "model_config": "0.8.0",
    "lr_scheduler": "0.8.0",
    "use_ulysses_sp": "0.8.0",
    "ulysses_sequence_parallel_size": "0.8.0",
    "_qat_enabled": "0.8.0",
}
_MEGATRON_ENGINE = dict.fromkeys(("module", "engine_config", "model_config", "tf_config", "_qat_enabled"), "0.9.0")
_MEGATRON_CONFIG = dict.fromkeys(
    (
        "context_parallel_size",
        "dynamic_context_parallel",
        "router_replay",
        "use_fused_kernels",
        "use_megatron_fsdp",
        "entropy_from_logits_with_chunking",
        "entropy_from_logits_chunk_size",
    ),
    "0.9.0",
)
_DIFFUSION = {"scaler": "0.8.0", "_autocast_dtype": "0.8.0"}
_MODEL_CONFIG = {"mtp": "0.8.0", "enable_activation_offload": "0.8.0", "external_lib": "0.8.0"}
_WORKER = {"config": "0.8.0", "actor": "0.8.0", "ref": "0.8.0"}
_PART = {"engine": "0.8.0", "engine_config": "0.8.0"}
_TRAINER = {"config": "0.8.0", "actor_rollout_wg": "0.8.0"}
_WORKER_GROUP = {"_dispatch_info": "0.8.0"}


def check_engine_module() -> None:
    """Raises UnsupportedError where a name that the engine is built on is missing or has other parameters."""
    require(_OF_ENGINES)


def check_megatron_modules() -> None:
    """The same for verl's engine for Megatron and Megatron-Core itself, of which some releases are too old."""
    supported_release(MEGATRON_CORE, ", or train with strategy=fsdp2")
    require(_OF_MEGATRON)


def check_worker_module() -> None:
    """The same for the class that hands an engine its options."""
    require(_OF_WORKERS)


def check_trainer_module(module: ModuleType) -> None:
    """The same for one of `TRAINERS`, which has been imported."""
    trainer = TRAINERS[module.__name__]
    if module.__name__ == V1 or hasattr(module, trainer):
        parameters = ("batch", "metrics", "logging_prefix")
        method = BEFORE_MODELS[module.__name__][1]
        require(
            [
                Name(f"{module.__name__}:{trainer}._balance_batch", parameters),
                Name(f"{module.__name__}:{trainer}.{method}"),
                Name("verl.utils.tracking:Tracking.log", ("data",)),
            ]
        )
    if module.__name__ == V1:
        require([Name("verl.utils.transferqueue_utils:tq.kv_batch_get")])


def check_engine(engine: object) -> None:
    """The same for an engine that has been initialised."""
    require_attributes(engine, _ENGINE, "verl")
    require_attributes(engine.model_config, _MODEL_CONFIG, "verl")  # type: ignore[attr-defined]


def check_megatron_engine(engine: object) -> None:
    """The same for one of Megatron's; one line where Megatron-Core is newer than what was tested."""
    say_if_untested(MEGATRON_CORE)
    require_attributes(engine, _MEGATRON_ENGINE, "verl")
    require_attributes(engine.engine_config, _MEGATRON_CONFIG, "verl")  # type: ignore[attr-defined]


def check_diffusion_engine(engine: object) -> None:
    """The same for what the updates of diffusion LMs read of it besides."""
    require_attributes(engine, _DIFFUSION, "verl")


def check_worker(worker: object) -> None:
    """The same for a worker that has built its engines."""
    require_attributes(worker, _WORKER, "verl")
    for part in (worker.actor, worker.ref):  # type: ignore[attr-defined]
        if part is not None:
            require_attributes(part, _PART, "verl")


def check_trainer(trainer: object) -> None:
    """The same for a trainer with its worker groups."""
    require_attributes(trainer, _TRAINER, "verl")
    require_attributes(trainer.actor_rollout_wg, _WORKER_GROUP, "verl")  # type: ignore[attr-defined]
