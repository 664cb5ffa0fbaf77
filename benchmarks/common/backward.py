"""What a backward pass leaves and needs: how far its gradients are from others, and the bytes that autograd holds."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass

import torch


def gradient_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient in the 2-norm; infinite if anything is missing or NaN."""
    if actual.keys() != expected.keys():
        return math.inf
    floor = 1e-3 * max(gradient.norm().item() for gradient in expected.values())
    errors = [
        (actual[name].double() - gradient.double()).norm().item() / max(gradient.double().norm().item(), floor)
        for name, gradient in expected.items()
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


class SavedBytes:
    """Bytes of storage that autograd holds for the backward pass, parameters aside: now, and the most there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.live = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> _Held:
        storage, held = tensor.untyped_storage(), _Held(tensor)
        if storage.data_ptr() not in self._parameters:
            if not self._holders[storage.data_ptr()]:
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
            self._holders[storage.data_ptr()] += 1
            weakref.finalize(held, self._free, storage.data_ptr(), storage.nbytes())
        return held

    def _free(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            self.live -= size


@dataclass(eq=False)
class _Held:
    tensor: torch.Tensor
