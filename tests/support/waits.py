"""Counts where the CPU would wait for a device, on a machine that has none.

On a CPU, what is the device's and what the CPU's own looks alike. They are told apart by where they come from: tensors
that `torch.from_numpy`, or `torch.tensor` without a device, makes are the CPU's; all others are taken for the device's,
those that `upload` sends among them. What waits is seen in two places: operators whose result the CPU needs (the value
of a scalar, a size that depends on values, a boolean index) by torch's dispatcher, however they are called; and
`tolist`, `numpy`, `cpu` and copies from memory that is not pinned by their Python calls, as torch skips the
dispatcher there. Work in numpy is the CPU's own. Kernels are left out: Triton's interpreter is all waiting.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dta_plugin.upload import upload

_READ_BY_THE_CPU = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_READERS = ("tolist", "numpy", "cpu", "__array__", "to")
_MAKERS = ("tensor", "as_tensor", "from_numpy")


class Waits:
    """places: a line per wait, what waited and where. copies: how often something was sent without waiting."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.copies = 0
        self.is_paused = False
        self._host: dict[int, torch.Tensor] = {}
        self.own = torch.from_numpy

    def found(self, what: str) -> None:
        if not self.is_paused:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.places.append(f"{what} at {frames[-1].filename}:{frames[-1].lineno}")

    def is_host(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self._host

    def keep_as_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self._host[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other tensor gets its address
        return tensor

    def send(self, arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
        """In place of `upload`."""
        self.copies += 1
        return [torch.empty(len(array), dtype=self.own(array).dtype).copy_(self.own(array)) for array in arrays]


def _watched_calls(waits: Waits, patch: pytest.MonkeyPatch) -> None:
    """Patches and not a mode of torch's function calls, which would end where autograd begins."""

    def reader(name: str) -> Callable[..., Any]:
        own = getattr(torch.Tensor, name)

        def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not waits.is_host(tensor) and (name != "to" or "cpu" in args):
                waits.found(name)
            if name == "to" and waits.is_host(tensor):
                waits.found("a copy from memory that is not pinned")
            return own(tensor, *args, **kwargs)

        return watched

    def maker(name: str) -> Callable[..., torch.Tensor]:
        own = getattr(torch, name)

        def watched(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            result = own(data, *args, **kwargs)
            if isinstance(data, torch.Tensor):
                return result
            if kwargs.get("device") is None:
                return waits.keep_as_host(result)
            waits.found(f"torch.{name} on a device")
            return result

        return watched

    for name in _READERS:
        patch.setattr(torch.Tensor, name, reader(name))
    for name in _MAKERS:
        patch.setattr(torch, name, maker(name))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _READ_BY_THE_CPU and not self.waits.is_host(args[0]):
            self.waits.found(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits.found(name)
        is_indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if is_indexed and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self.waits.found("a boolean index")
        return func(*args, **kwargs)


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Within the context, waits are counted."""
    from triton.runtime import interpreter

    waits, launch = Waits(), interpreter.GridExecutor.__call__

    def paused(self: Any, *args: Any, **kwargs: Any) -> None:
        before, waits.is_paused = waits.is_paused, True
        try:
            launch(self, *args, **kwargs)
        finally:
            waits.is_paused = before

    with patch.context() as within:
        within.setattr(interpreter.GridExecutor, "__call__", paused)
        _watched_calls(waits, within)
        for module in list(sys.modules.values()):
            if getattr(module, "upload", None) is upload:
                within.setattr(module, "upload", waits.send)
        with _Operators(waits):
            yield waits
