"""The CPU for verl 0.8, which has no platforms: a device that verl knows, but has no engines and no padding for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from dta_plugin.adapters.imports import when_imported
from dta_plugin.adapters.verl_cpu.device import device_module, replace_gpu_settings


def install() -> None:
    """As platform.install. Engines are the ones that verl registers for CUDA."""
    import verl.utils.attention_utils as attention
    import verl.utils.device as device

    cpu = device_module()
    device.get_torch_device = lambda: cpu
    device.get_nccl_backend = lambda: "gloo"
    attention._get_attention_functions = lambda: (_index_first_axis, _pad_input, None, _unpad_input)
    when_imported("verl.workers.engine.base", _register_for_cpu)
    replace_gpu_settings()


def _register_for_cpu(module: ModuleType) -> None:
    """From here on, what is registered for CUDA is registered for a CPU, too."""
    register = module.EngineRegistry.register

    def wrapped(model_type: str, backend: Any, device: Any = "cuda") -> Any:
        devices = [device] if isinstance(device, str) else device
        return register(model_type, backend, [*devices, "cpu"] if "cuda" in devices else devices)

    module.EngineRegistry.register = wrapped


# As in flash_attn.bert_padding, which exists for CUDA only.


def _index_first_axis(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return rows[indices]


def _unpad_input(padded: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """[B, S, ...], [B, S] -> rows, their indices in [B * S], int32 [B + 1] offsets, the longest length."""
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return padded.flatten(0, 1)[indices], indices, offsets, int(lengths.max())


def _pad_input(rows: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    padded = rows.new_zeros(batch * length, *rows.shape[1:])
    padded[indices] = rows
    return padded.unflatten(0, (batch, length))
