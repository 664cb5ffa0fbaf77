"""The recurrent states of one root-to-leaf path at the places where chunks begin, and the gradients left for them.

As keys and values in kv_arena.py: a chunk reads the state behind its ancestors and leaves those that later chunks begin
with; in the backward pass, which takes the chunks in reverse, it adds to the gradient of the state that it read and
collects what its descendants left for its own. A state belongs to a depth. The one at a chunk's first depth is that of
its ancestors as long as their keys are in the arena, because whoever else leaves a state there takes their slots first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.recurrent.states import Key


class StateArena:
    """States [1, ...] and their gradients, float32 or wider, by layer and depth."""

    def __init__(self) -> None:
        self._states: dict[tuple[Key, int], torch.Tensor] = {}
        self._gradients: dict[tuple[Key, int], torch.Tensor] = {}

    def read(self, key: Key, depth: int) -> torch.Tensor:
        return self._states[key, depth]

    def write(self, key: Key, depth: int, state: torch.Tensor) -> None:
        self._states[key, depth] = state

    def add_gradient(self, key: Key, depth: int, gradient: torch.Tensor) -> None:
        gradient = gradient.to(accumulation_dtype(gradient.dtype))
        sum_ = self._gradients.get((key, depth))
        self._gradients[key, depth] = gradient if sum_ is None else sum_ + gradient

    def take_gradient(self, key: Key, depth: int) -> torch.Tensor:
        """Of the state that was written last; it is gone then."""
        gradient = self._gradients.pop((key, depth), None)
        return torch.zeros_like(self._states[key, depth]) if gradient is None else gradient

    def clear(self) -> None:
        self._states.clear()
        self._gradients.clear()

    def drop_gradients(self) -> None:
        """Forget what descendants have left."""
        self._gradients.clear()


class ChunkStates:
    """One chunk's: `first` ancestors above it, later chunks that begin at `depths`; see `States`."""

    def __init__(self, arena: StateArena, first: int, depths: Sequence[int]) -> None:
        self.arena, self.first, self.depths = arena, first, depths

    def enter(self, key: Key, inputs: Iterable[torch.Tensor]) -> torch.Tensor | None:
        if not self.first:
            return None
        return _Enter.apply(self, key, *(x for x in inputs if x.requires_grad))

    def leave(self, key: Key, out: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return _Leave.apply(out, states, self, key) if self.depths else out


class _Enter(torch.autograd.Function):
    """The state above a chunk. trained: tensors by whose gradients the backward pass comes anyway, to one at least."""

    @staticmethod
    def forward(ctx: Any, place: ChunkStates, key: Key, *trained):
        ctx.place, ctx.key, ctx.count = place, key, len(trained)
        return place.arena.read(key, place.first).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        ctx.place.arena.add_gradient(ctx.key, ctx.place.first, gradient)
        return None, None, *(None,) * ctx.count


class _Leave(torch.autograd.Function):
    """`out` as it is; in the backward pass, for the states what descendants have left."""

    @staticmethod
    def forward(ctx: Any, out, states, place: ChunkStates, key: Key):
        for state, depth in zip(states.split(1), place.depths, strict=True):
            place.arena.write(key, depth, state.clone())
        ctx.place, ctx.key, ctx.dtype = place, key, states.dtype
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        left = [ctx.place.arena.take_gradient(ctx.key, depth) for depth in ctx.place.depths]
        return gradient, torch.cat(left).to(ctx.dtype), None, None
