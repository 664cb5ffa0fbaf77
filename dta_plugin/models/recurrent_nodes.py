"""The way of last resort for recurrent modules, exact for all that keep their state in a cache: node after node.

A node is a run of tokens without a fork. Nodes of one length on one level run in one call of the module's own forward,
as a batch, with a cache that hands out the states behind their parents, with their graph, and takes theirs.

It is as exact as a mixer is with a cache. Nodes of one token take the mixer's kernel for decoding: those of Nemotron-H
and Zamba 2 leave out the bound on the length of steps that their scans have, and differ by 1e-3. The scan of Mamba 1
takes no state at all, and begins every node of several tokens from nothing. These run by their functions; of a mixer
whose functions are not known, the probe finds out.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dta_plugin.errors import UnsupportedError
from dta_plugin.models.recurrent_functions import MixerCall
from dta_plugin.recurrent.plan import Blocks

# A state of a mixer: "conv" or "recurrent", and its number.
Name = tuple[str, int]


def run_by_nodes(
    call: MixerCall,
    mixer: nn.Module,
    forward: Callable[..., Any],
    cache_name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The mixer's output [1, T, ...] for a packed row.

    forward: of its class. cache_name: what that calls its cache. args, kwargs: of the call.
    """
    bound = inspect.signature(forward).bind(mixer, *args, **kwargs)
    hidden: torch.Tensor = bound.arguments["hidden_states"]
    call.ran_by("nodes")
    nodes = call.plan.nodes()
    states = _States(call, nodes, [hidden, *mixer.parameters()])
    pieces: list[torch.Tensor] = []
    places: list[np.ndarray] = []
    for batch, tokens in _batches(nodes):
        cache = _NodeCache(states, batch)
        bound.arguments |= {"hidden_states": hidden[0, torch.from_numpy(tokens).to(hidden.device)], cache_name: cache}
        with saved_tensors_hooks(cache.saved, _as_it_is):
            out = forward(*bound.args, **bound.kwargs)
        if not isinstance(out, torch.Tensor):
            raise UnsupportedError(
                f"{type(mixer).__name__} gives a {type(out).__name__}. Expected hidden states [B, L, H] alone; use "
                "another model."
            )
        cache.hand_over()
        pieces.append(out.flatten(0, 1))
        places.append(tokens.reshape(-1))
    order = torch.from_numpy(np.argsort(np.concatenate(places))).to(hidden.device)
    return states.leave(torch.cat(pieces)[order][None])


def _batches(nodes: Blocks) -> Iterator[tuple[list[int], np.ndarray]]:
    """Nodes of one level and one length, and their tokens int64 [nodes, length]."""
    for level in nodes.levels:
        alike: dict[int, list[int]] = defaultdict(list)
        for node in range(len(nodes))[level]:
            alike[int(nodes.length[node])].append(node)
        for length, batch in alike.items():
            yield batch, nodes.start[batch][:, None] + np.arange(length)


class _States:
    """The states [1, ...] behind every node of a mixer's call, by name. inputs: what the mixer computes from."""

    def __init__(self, call: MixerCall, nodes: Blocks, inputs: list[torch.Tensor]) -> None:
        self.call, self.nodes, self.inputs = call, nodes, inputs
        self.behind: dict[Name, dict[int, torch.Tensor]] = defaultdict(dict)
        self._keys: dict[Name, Any] = {}
        self._entered: dict[Name, torch.Tensor | None] = {}

    def above(self, name: Name, batch: list[int]) -> torch.Tensor | None:
        """Those that the nodes of a batch begin with [nodes, ...]; None at the start of sequences."""
        parents = [int(self.nodes.parent[node]) for node in batch]
        states = [self.entered(name) if parent < 0 else self.behind[name][parent] for parent in parents]
        known = [state for state in states if state is not None]
        return torch.cat(known) if known else None

    def entered(self, name: Name) -> torch.Tensor | None:
        if name not in self._entered:
            self._keys[name] = self.call.key(f"{name}")
            self._entered[name] = self.call.states.enter(self._keys[name], self.inputs)
        return self._entered[name]

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        if len(self.nodes.leaves):
            for name, states in self.behind.items():
                left = torch.cat([states[node] for node in self.nodes.leaves.tolist()])
                out = self.call.states.leave(self._keys[name], out, left)
        return out


class _NodeCache:
    """What a mixer sees of transformers' cache: the states of a batch of nodes, of one layer.

    Kernels for single tokens write in place to the state that they get, and tell nobody: it is a copy, from which the
    next state is taken where none is told; what the backward pass needs of it is copied before.
    """

    def __init__(self, states: _States, batch: list[int]) -> None:
        self._states, self._batch = states, batch
        self._given: dict[Name, torch.Tensor] = {}
        self._new: dict[Name, torch.Tensor] = {}

    def saved(self, x: torch.Tensor) -> torch.Tensor:
        """What is kept of a tensor for the backward pass."""
        given = {state.untyped_storage().data_ptr() for state in self._given.values()}
        return x.detach().clone() if x.untyped_storage().data_ptr() in given else x.detach()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._give(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._give(("recurrent", state_idx))

    def _give(self, name: Name) -> torch.Tensor | None:
        state = self._states.above(name, self._batch)
        if state is not None:
            self._given[name] = state = state.clone()
        return state

    def has_previous_state(self, layer_idx: int = 0, state_idx: int = 0) -> bool:
        return self.get_conv_state(layer_idx, state_idx) is not None

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return True

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """-> the inputs [nodes, D, length] behind those that came before."""
        name = ("conv", state_idx)
        before = self._states.above(name, self._batch)
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        self._new[name] = torch.nn.functional.pad(inputs, (max(0, size - inputs.shape[-1]), 0))[..., -size:]
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        name = ("recurrent", state_idx)
        self._states.above(name, self._batch)
        self._new[name] = recurrent_states
        return recurrent_states

    def hand_over(self) -> None:
        """Every node has its states."""
        for name, states in (self._given | self._new).items():
            self._states.behind[name].update(zip(self._batch, states.split(1), strict=True))


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x
