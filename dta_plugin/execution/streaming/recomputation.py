"""What makes a chunk that runs again give what it gave first: autocast, random numbers, checkpointing of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


@contextmanager
def plain_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of layers in its non-reentrant form: the same values, and `autograd.grad` works."""
    layers: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if hasattr(layer, "_gradient_checkpointing_func")]
    own = [layer._gradient_checkpointing_func for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, function in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = function


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of the first pass, for the chunks that run again in the backward pass, outside of it."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, kind: str) -> Autocast:
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def entered(self) -> torch.autocast:
        return torch.autocast(self.kind, self.dtype, enabled=self.enabled)


@dataclass(slots=True)
class RandomNumbers:
    """The state of the random generators before each chunk ran first. Does nothing for models without dropout."""

    device: torch.device
    is_drawn: bool
    _states: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: nn.Module, device: torch.device) -> RandomNumbers:
        dropouts = (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        return cls(device, any(dropout.p > 0 and dropout.training for dropout in dropouts))

    def remember(self, chunk: int) -> None:
        if self.is_drawn:
            self._states[chunk] = self._current()

    @contextmanager
    def again(self, chunk: int) -> Iterator[None]:
        """Within the context, the generators continue from where they were before `chunk`."""
        if not self.is_drawn:
            yield
            return
        before = self._current()
        self._restore(self._states[chunk])
        try:
            yield
        finally:
            self._restore(before)

    def _current(self) -> Any:
        on_device = self.device.type != "cpu"
        return torch.get_rng_state(), get_device_states(torch.empty(0, device=self.device)) if on_device else None

    def _restore(self, state: Any) -> None:
        cpu, devices = state
        torch.set_rng_state(cpu)
        if devices is not None:
            set_device_states(*devices)
