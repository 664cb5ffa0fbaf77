"""The keys and values of one root-to-leaf path, and the gradients that descendants leave for them, layer by layer.

Streamed execution calls the model chunk by chunk. In every attention layer a chunk writes its keys and values behind
those of its ancestors, attends to both, and leaves those of its cached tokens (chunk_plan.py). In the backward pass,
which takes the chunks in reverse, it adds to the gradients of its ancestors' keys and collects what its descendants
left for its own. All of this happens in place in buffers allocated once, one slot per depth: nothing that grows with
depth is copied or kept per chunk. Gradients accumulate in float32 (float64 for float64 models).
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from dta_plugin.attention.function import accumulator
from dta_plugin.attention.mask import HostArrays, TreeMask
from dta_plugin.execution.streaming.state_arena import ChunkStates, StateArena
from dta_plugin.recurrent.plan import StatePlan


class ArenaLayer:
    """One layer's buffers, [1, Hkv, slots, D] in memory [1, slots, Hkv, D]; allocated when they are first needed."""

    k: torch.Tensor
    v: torch.Tensor
    grad_k: torch.Tensor
    grad_v: torch.Tensor

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.is_allocated = self.has_gradients = False

    def allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if not self.is_allocated:
            self.k, self.v = (
                x.new_empty(1, self.slots, x.shape[1], x.shape[3]).transpose(1, 2) for x in (k.detach(), v.detach())
            )
            self.is_allocated = True

    def allocate_gradients(self) -> None:
        if not self.has_gradients:
            self.grad_k, self.grad_v = accumulator(self.k), accumulator(self.v)
            self.has_gradients = True

    def drop_gradients(self) -> None:
        if self.has_gradients:
            del self.grad_k, self.grad_v
            self.has_gradients = False


class Arena:
    """The layers of one streamed run. slots: the deepest chunk's ancestors and its own tokens.

    states: of recurrent layers.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.states = StateArena()
        self._layers: dict[tuple[int, int], ArenaLayer] = {}

    def layer(self, index: int, call_number: int) -> ArenaLayer:
        """call_number: a layer that attends several times has a place for each."""
        return self._layers.setdefault((index, call_number), ArenaLayer(self.slots))

    def clear(self) -> None:
        """Give the buffers up."""
        self._layers.clear()
        self.states.clear()

    def drop_gradients(self) -> None:
        """Forget what descendants have left."""
        self.states.drop_gradients()
        for layer in self._layers.values():
            layer.drop_gradients()


class ArenaPlace:
    """A chunk in one layer of the arena, behind its `first` ancestors; see `Place` in attention/function.py.

    cached: int64 [S] slots of the chunk's cached tokens (see `Chunk` in chunk_plan.py) while the whole chunk is in the
    arena. The ancestors' slots must hold the same keys and values in the chunk's backward pass as in its forward pass.
    """

    def __init__(self, layer: ArenaLayer, first: int, cached: torch.Tensor) -> None:
        self.layer = layer
        self.first = first
        self.cached = cached
        self.kept = slice(first, first + len(cached))

    def write(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.layer.allocate(k, v)
        stop = self.first + k.shape[2]
        self.layer.k[:, :, self.first : stop] = k
        self.layer.v[:, :, self.first : stop] = v
        return self.layer.k[:, :, :stop], self.layer.v[:, :, :stop]

    def keep(self) -> None:
        """Move the cached tokens to the slots behind the ancestors."""
        if len(self.cached):
            for buffer in (self.layer.k, self.layer.v):
                buffer[:, :, self.kept] = buffer[:, :, self.cached]

    def gradients(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Move what descendants left for the cached tokens to where these lie within the chunk."""
        self.layer.allocate_gradients()
        if len(self.cached):
            for buffer in (self.layer.grad_k, self.layer.grad_v):
                left = buffer[:, :, self.kept].clone()
                buffer[:, :, self.kept] = 0
                buffer[:, :, self.cached] = left
        stop = keys.shape[2]
        return self.layer.grad_k[:, :, :stop], self.layer.grad_v[:, :, :stop]

    def collect(self, grad_keys: torch.Tensor, grad_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the chunk's own gradients and leave zeros."""
        own = grad_keys[:, :, self.first :], grad_values[:, :, self.first :]
        taken = own[0].clone(), own[1].clone()
        for buffer in own:
            buffer.zero_()
        return taken


class ChunkMask(TreeMask):
    """Visibility of a chunk: its ancestors, one token per depth, then its own tokens.

    exit, depth: int64 [C] of its own tokens, `exit` counted from the chunk's first; host: the same in the CPU's memory.
    first: number of ancestors, which all its tokens see. cached: int64 [S] positions within the chunk, see `Chunk` in
    chunk_plan.py. leaves: [K] positions behind which other chunks begin. reach, host_reach: [C] alike, where tokens
    attend both ways: all of them among the chunk's own.
    """

    def __init__(
        self,
        exit: torch.Tensor,
        depth: torch.Tensor,
        backend: str,
        arena: Arena,
        first: int,
        cached: torch.Tensor,
        host: HostArrays,
        leaves: np.ndarray,
        reach: torch.Tensor | None = None,
        host_reach: np.ndarray | None = None,
    ) -> None:
        ancestors = torch.arange(first, device=exit.device)
        stop = torch.full_like(ancestors, first + len(exit))
        own_exit, own_depth = host
        above = np.arange(first)
        behind = np.concatenate([np.full_like(above, first + len(exit)), first + own_exit])
        super().__init__(
            torch.cat([stop, first + exit]),
            torch.cat([ancestors, depth]),
            backend,
            (behind, np.concatenate([above, own_depth])),
            None if reach is None else torch.cat([ancestors + 1, first + reach]),
            None if host_reach is None else np.concatenate([above + 1, first + host_reach]),
        )
        self._arena, self._first, self._cached = arena, first, first + cached
        self._own_depth, self._leaves = own_depth, leaves
        self.states = ChunkStates(arena.states, first, (own_depth[leaves] + 1).tolist())
        self._calls_of_pass: dict[int, int] = {}
        self._state_calls_of_pass: dict[int, int] = {}

    def at_layer(self, index: int) -> TreeMask:
        """The same mask, with this chunk's place in that layer of the arena."""
        mask = copy.copy(self)
        seen = self.calls[index]
        call_number = seen % self._calls_of_pass[index] if index in self._calls_of_pass else seen
        mask.place = ArenaPlace(self._arena.layer(index, call_number), self._first, self._cached)
        return mask

    def state_plan(self) -> StatePlan:
        return self.cached("states", lambda: StatePlan.from_depth(self._own_depth, self._leaves))

    def state_call_number(self, module: int) -> int:
        seen = self.state_calls[module]
        return seen % self._state_calls_of_pass[module] if module in self._state_calls_of_pass else seen

    def close(self) -> None:
        """The forward pass is over: what calls from now on is recomputed."""
        self._calls_of_pass, self._state_calls_of_pass = dict(self.calls), dict(self.state_calls)
