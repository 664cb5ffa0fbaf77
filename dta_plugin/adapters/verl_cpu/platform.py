"""The CPU as a platform of verl 0.9.

Engines are the ones that verl registers for NVIDIA, and so are those that the plugin registers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

from dta_plugin.adapters.verl_cpu.device import device_module, replace_gpu_settings

NAME = "cpu"


def install() -> None:
    """Make this process's verl take the CPU for its accelerator. To be called at the end of `import verl`."""
    set_platform(CPUPlatform())
    # The registry has no engine for "cpu", and these two variables are verl's way to choose another one.
    os.environ.update(VERL_ENGINE_DEVICE="cuda", VERL_ENGINE_VENDOR="nvidia")

    replace_gpu_settings()


@PlatformRegistry.register(platform=NAME)
class CPUPlatform(PlatformBase):
    """The CPU as verl's accelerator."""

    device_name = NAME
    vendor_name = NAME

    @functools.cached_property
    def device_module(self) -> ModuleType:
        return device_module()

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
