"""The CPU where verl, in all its versions, expects a GPU."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._init_utils as fsdp_init

from dta_plugin.adapters.imports import when_imported


def replace_gpu_settings() -> None:
    """To be called before the modules that import these names are loaded."""
    import verl.utils.distributed as distributed
    import verl.utils.fsdp_utils as fsdp_utils

    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray,
        backend="cpu:gloo",  # the default would be "cpu:gloo,cpu:gloo"
    )
    fsdp_utils.CPUOffloadPolicy = _no_offload
    vars(fsdp)["CPUOffload"] = _no_offload
    fsdp_init._check_module_states_for_sync_module_states = _allow_cpu_states
    when_imported("verl.utils.model", _replace_value_models)


def _replace_value_models(module: ModuleType) -> None:
    vars(module)["load_valuehead_model"] = _value_model


def _value_model(local_path: str, torch_dtype: torch.dtype, model_config: Any, trust_remote_code: bool) -> Any:
    """In place of verl's, which asks for FlashAttention."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )


def _no_offload(**_: bool) -> None:
    """In place of both FSDPs' offload settings: parameters are on the CPU as it is, and there is no memory to pin."""


def _allow_cpu_states(module_states: list[torch.Tensor]) -> None:
    """In place of FSDP 1's check that states to broadcast are on a GPU: gloo broadcasts from a CPU."""


def device_module() -> ModuleType:
    """torch.cpu, with the functions of torch.cuda that verl calls besides."""
    module = ModuleType("torch.cpu", "torch.cpu for verl")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    process = psutil.Process()

    def memory(*_: Any) -> int:
        return process.memory_info().rss

    def mem_get_info(*_: Any) -> tuple[int, int]:
        found = psutil.virtual_memory()
        return found.available, found.total

    module.__dict__.update(
        get_device_name=lambda *_: "CPU",
        memory_allocated=memory,
        memory_reserved=memory,
        max_memory_allocated=memory,
        max_memory_reserved=memory,
        mem_get_info=mem_get_info,
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    return module
