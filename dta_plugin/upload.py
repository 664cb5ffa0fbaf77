"""Arrays that the CPU has made, sent to a device in one copy that nobody waits for.

The CPU knows the tree before the device does, so everything that describes a batch is made there, and goes one way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# Every array begins at a multiple of this: Triton compiles a kernel anew for pointers that are not aligned to 16 bytes.
_ALIGNMENT = 64


def upload(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
    """Arrays [n] of one dtype as tensors on `device`, in the order of its work, without waiting for it.

    On a CPU the tensors are the arrays' own memory; elsewhere they are views of one buffer.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    is_pinned = device.type == "cuda"
    buffer, starts = joined(arrays, is_pinned)
    sent = buffer.to(device, non_blocking=is_pinned)
    return [sent[start : start + len(array)] for start, array in zip(starts, arrays, strict=True)]


def joined(arrays: Sequence[np.ndarray], is_pinned: bool) -> tuple[torch.Tensor, list[int]]:
    """One buffer with all arrays, and where each begins. Pinned memory is kept by torch until its copy is done."""
    step = _ALIGNMENT // arrays[0].itemsize
    sizes = [-(-len(array) // step) * step for array in arrays]
    starts = [0, *np.cumsum(sizes).tolist()]
    dtype = torch.from_numpy(arrays[0][:0]).dtype
    buffer = torch.empty(starts.pop(), dtype=dtype, pin_memory=is_pinned)
    target = buffer.numpy()
    for start, array in zip(starts, arrays, strict=True):
        target[start : start + len(array)] = array
    return buffer, starts
