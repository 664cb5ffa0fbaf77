"""Delta rules along a tree by a kernel for several sequences in a row: level by level, or every path by itself.

*Levels*: one call per level of nodes, each node a sequence that begins with its parent's final state. Every token is
computed once. *Rescan*: one call for all paths from the top of the row to an end, in which shared tokens come again;
each token's output is taken from one of its paths, so that gradients are the tree's. What a rescan repeats lives in one
layer at a time: it is computed once more in the backward pass.

A kernel has the signature of FLA's `chunk_gated_delta_rule` and `chunk_kda`, and differentiates in its states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.recurrent.fla import Kernel
from dta_plugin.recurrent.gather import spans, take
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.upload import upload


class Inputs(NamedTuple):
    """As of `tree_gated_delta_rule` or `tree_kda`, all [1, T, heads, ...]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor


def by_levels(
    kernel: Kernel, inputs: Inputs, plan: StatePlan, initial: torch.Tensor | None, use_qk_l2norm_in_kernel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results as of `tree_gated_delta_rule`."""
    device = inputs.value.device
    cut = plan.cached(("levels", device), lambda: _cut(plan, device))
    inputs = _same_heads(inputs)
    if cut.order is not None:
        inputs = Inputs(*(take(x, cut.order[0], 1) for x in inputs))
    states = _widened(initial)
    outs: list[torch.Tensor] = []
    behind: list[torch.Tensor] = []
    for level in cut.levels:
        out, states = kernel(
            *(x[:, level.tokens] for x in inputs),
            initial_state=None if states is None else states.index_select(0, level.above),
            output_final_state=level.hands_on,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **level.bounds.arguments(),
        )
        outs.append(out)
        if states is not None:
            behind.append(states)
    out = torch.cat(outs, 1)
    if cut.order is not None:
        out = out.index_select(1, cut.order[1])
    left = torch.cat(behind).index_select(0, cut.leaves) if len(plan.leaves) else _no_states(inputs)
    return out.to(inputs.query.dtype), left


def by_paths(
    kernel: Kernel, inputs: Inputs, plan: StatePlan, initial: torch.Tensor | None, use_qk_l2norm_in_kernel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results as of `tree_gated_delta_rule`."""
    device = inputs.value.device
    paths = plan.cached(("paths", device), lambda: _paths(plan, device))

    def run(initial: torch.Tensor | None, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = _same_heads(Inputs(*given))
        out, states = kernel(
            *(take(x, paths.tokens, 1) for x in own),
            initial_state=None if initial is None else _widened(initial.expand(paths.count, *initial.shape[1:])),
            output_final_state=len(plan.leaves) > 0,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **paths.bounds.arguments(),
        )
        left = _no_states(own) if states is None else states.index_select(0, paths.leaves)
        return out.index_select(1, paths.places).to(own.query.dtype), left

    found: tuple[torch.Tensor, torch.Tensor] = checkpoint(
        run, initial, *inputs, use_reentrant=False, preserve_rng_state=False
    )
    return found


def _same_heads(inputs: Inputs) -> Inputs:
    """Keys that several heads of values share, repeated: not every release groups heads itself."""
    groups = inputs.value.shape[2] // inputs.key.shape[2]
    if groups == 1:
        return inputs
    query, key = (x.repeat_interleave(groups, 2) for x in (inputs.query, inputs.key))
    return inputs._replace(query=query, key=key)


def _widened(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else states.to(accumulation_dtype(states.dtype))


def _no_states(inputs: Inputs) -> torch.Tensor:
    shape = (0, inputs.value.shape[2], inputs.key.shape[3], inputs.value.shape[3])
    return inputs.value.new_zeros(shape, dtype=accumulation_dtype(inputs.value.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class _Bounds:
    """Where sequences begin and the last ends, int64 [N + 1]: on the device, and for the host, which need not wait.

    The same tensors in every layer: FLA keeps what it derives from them by identity.
    """

    device: torch.Tensor
    host: torch.Tensor

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> _Bounds:
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return cls(upload([bounds], device)[0], torch.from_numpy(bounds))

    def arguments(self) -> dict[str, torch.Tensor]:
        return {"cu_seqlens": self.device, "cu_seqlens_cpu": self.host}


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """Nodes that are computed together.

    Attributes:
        tokens: theirs, in the order of levels.
        bounds: of the nodes among them.
        above: int64 [nodes] which state of the level above each begins with.
        hands_on: whether a state behind one of them is asked for.
    """

    tokens: slice
    bounds: _Bounds
    above: torch.Tensor
    hands_on: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """order: int64 [T] the row's tokens in the order of levels, and the way back; None where it is the row's own.

    leaves: int64 [K] the nodes behind which states leave.
    """

    order: tuple[torch.Tensor, torch.Tensor] | None
    leaves: torch.Tensor
    levels: list[_Level]


def _cut(plan: StatePlan, device: torch.device) -> _Cut:
    nodes = plan.nodes()
    order = spans(nodes.start, nodes.length)
    on_device = upload([nodes.leaves, order, np.argsort(order)], device)
    stops = np.cumsum(nodes.length)
    levels: list[_Level] = []
    top = 0  # the first node of the level above
    for level in nodes.levels:
        above = np.maximum(nodes.parent[level] - top, 0)
        tokens = slice(int(stops[level.start] - nodes.length[level.start]), int(stops[level.stop - 1]))
        hands_on = level is not nodes.levels[-1] or bool((nodes.leaves >= level.start).any())
        levels.append(_Level(tokens, _Bounds.of(nodes.length[level], device), upload([above], device)[0], hands_on))
        top = level.start
    is_own = bool((order == np.arange(len(order))).all())
    return _Cut(None if is_own else (on_device[1], on_device[2]), on_device[0], levels)


@dataclass(frozen=True, slots=True, eq=False)
class _Paths:
    """The row's paths, one after the other.

    Attributes:
        count: of paths.
        bounds: theirs.
        tokens: int64 [N] theirs.
        places: int64 [T] where among them each token's output is taken.
        leaves: int64 [K] the path behind whose end each state leaves.
    """

    count: int
    bounds: _Bounds
    tokens: torch.Tensor
    places: torch.Tensor
    leaves: torch.Tensor


def _paths(plan: StatePlan, device: torch.device) -> _Paths:
    nodes, ends = plan.nodes(), plan.ends()
    chain = np.empty((len(ends), len(nodes.levels)), dtype=np.int64)  # nodes upward from each end, -1 above the top
    at = ends
    for step in range(chain.shape[1]):
        chain[:, step] = at
        at = np.where(at < 0, -1, nodes.parent[at])
    downward = chain[:, ::-1]
    on_path = downward[downward >= 0]
    tokens = spans(nodes.start[on_path], nodes.length[on_path])
    places = np.empty(len(plan), dtype=np.int64)
    places[tokens[::-1]] = np.arange(len(tokens))[::-1]  # of the first path with a token, which is written last
    lengths = np.where(chain < 0, 0, nodes.length[chain]).sum(1)
    sent = upload([tokens, places, np.searchsorted(ends, nodes.leaves)], device)
    return _Paths(len(ends), _Bounds.of(lengths, device), *sent)
