"""verl on a machine without an accelerator: a CPU platform, and the places where verl 0.9 assumes a GPU.

Promises: after `install()`, stock verl trains here with FSDP or FSDP2 over gloo; what verl computes is not changed.
A rank is one of Ray's logical GPUs (`ray.init(num_gpus=N)`). Engines are the ones that verl registers for NVIDIA, and
so are those that the plugin registers.

Known limit: FSDP 1 with `param_offload` asks for a device "cpu:cpu"; FSDP 2 with it works.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._init_utils as fsdp_init
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

NAME = "cpu"


def install() -> None:
    """Make this process's verl take the CPU for its accelerator. To be called at the end of `import verl`."""
    set_platform(CPUPlatform())
    # The registry has no engine for "cpu", and these two variables are verl's way to choose another one.
    os.environ.update(VERL_ENGINE_DEVICE="cuda", VERL_ENGINE_VENDOR="nvidia")

    import verl.utils.distributed as distributed
    import verl.utils.fsdp_utils as fsdp_utils

    # These names are replaced before the modules that import them are loaded.
    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray,
        backend="cpu:gloo",  # the default would be "cpu:gloo,cpu:gloo"
    )
    fsdp_utils.CPUOffloadPolicy = _no_offload
    vars(fsdp)["CPUOffload"] = _no_offload
    fsdp_init._check_module_states_for_sync_module_states = _allow_cpu_states


def _no_offload(**_: bool) -> None:
    """In place of both FSDPs' offload settings: parameters are on the CPU as it is, and there is no memory to pin."""


def _allow_cpu_states(module_states: list[torch.Tensor]) -> None:
    """In place of FSDP 1's check that states to broadcast are on a GPU: gloo broadcasts from a CPU."""


@PlatformRegistry.register(platform=NAME)
class CPUPlatform(PlatformBase):
    """The CPU as verl's accelerator."""

    device_name = NAME
    vendor_name = NAME

    @functools.cached_property
    def device_module(self) -> ModuleType:
        return _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        """What verl hands to `Tensor.to`: an index would mean a GPU."""
        return NAME

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its logical GPUs

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def cudart(self) -> None:
        return None


def _device_module() -> ModuleType:
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
