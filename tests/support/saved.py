"""How much memory a backward pass would need: what autograd has saved and not yet freed."""

from __future__ import annotations

import torch


class SavedBytes:
    """Bytes saved for backward passes that are alive, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.now = self.peak = 0
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> _Held:
        size = tensor.numel() * tensor.element_size()
        is_own = tensor.untyped_storage().data_ptr() not in self._parameters
        return _Held(self, tensor, size if is_own else 0)


class _Held:
    def __init__(self, count: SavedBytes, tensor: torch.Tensor, size: int) -> None:
        self.count, self.tensor, self.size = count, tensor, size
        count.now += size
        count.peak = max(count.peak, count.now)

    def __del__(self) -> None:
        self.count.now -= self.size
