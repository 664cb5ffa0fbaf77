"""The functions by which transformers' mixers carry state along a sequence, and what stands in for each on a tree.

A stand-in takes what the mixer's forward gives to the function, for one packed row, and the call that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from dta_plugin.attention.mask import TreeMask
from dta_plugin.dtypes import compute_dtype
from dta_plugin.errors import UnsupportedError
from dta_plugin.recurrent.choice import TORCH_SCAN, delta_rule_way
from dta_plugin.recurrent.convolution import tree_causal_conv1d
from dta_plugin.recurrent.fla import CONVOLUTION, GATED_DELTA_RULE, KDA, Kernel
from dta_plugin.recurrent.fla_check import trusted_kernel
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.selective_scan import tree_selective_scan
from dta_plugin.recurrent.state_space import tree_mamba2_scan
from dta_plugin.recurrent.varlen import Inputs

Handover = tuple[torch.Tensor, torch.Tensor]  # what a function gives, and the states that leave the row


class MixerCall:
    """One call of a mixer with a tree."""

    def __init__(self, tree: TreeMask, mixer: nn.Module) -> None:
        self.plan: StatePlan = tree.state_plan()
        self.states = tree.states
        self._tree, self._mixer, self._number = tree, mixer, tree.state_call_number(id(mixer))
        self._asked: list[str] = []
        self._running = ""

    def key(self, name: str) -> tuple[int, int, str, int]:
        """Of the next state of this name; every pass asks in the same order."""
        self._asked.append(name)
        return id(self._mixer), self._number, name, self._asked.count(name)

    @torch.compiler.disable
    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What stands in for the known function `name`."""
        self._running = name
        return OPERATIONS[name].run(self, *args, **kwargs)

    def carry(self, inputs: tuple[torch.Tensor, ...], run: Callable[[torch.Tensor | None], Handover]) -> torch.Tensor:
        """Run a function between the state that comes in and those that leave. inputs: beside the state."""
        key = self.key(self._running)
        out, states = run(self.states.enter(key, [*inputs, *self._mixer.parameters()]))
        return self.states.leave(key, out, states)

    def kernel(self, name: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Kernel | None:
        """FLA's function, where it serves and Triton's kernels are welcome. widths: of heads."""
        is_welcome = self._tree.backend in ("auto", "triton")
        return trusted_kernel(name, device, dtype, *widths) if is_welcome else None

    def ran_by(self, way: str) -> None:
        """For the report: who has computed the mixer's function."""
        self._tree.backends_used.add(way)

    def check_carried(self, names: Iterable[str]) -> None:
        """Raises UnsupportedError where a mixer has not called some of its known functions."""
        missing = {name for name in names if OPERATIONS[name].carries_state}.difference(self._asked)
        if missing:
            raise UnsupportedError(
                f"{type(self._mixer).__name__} did not call {', '.join(sorted(missing))}, by which it carries its "
                "state. Expected it to; switch off whatever replaces its forward."
            )


def _convolution(
    call: MixerCall,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    act = None if activation is None else ACT2FN[activation]
    kernel = call.kernel(CONVOLUTION, x.device, compute_dtype(x.device.type, weight.dtype))
    if kernel is not None:
        call.ran_by("fla convolution")
    return call.carry((x, weight), lambda state: tree_causal_conv1d(x, weight, bias, act, call.plan, state, kernel))


def _delta_rule(
    name: str,
    call: MixerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """name: what FLA calls the rule."""
    inputs = Inputs(query, key, value, g, beta)
    dtype = reduce(torch.promote_types, (query.dtype, key.dtype, value.dtype))
    kernel = call.kernel(name, query.device, dtype, key.shape[-1], value.shape[-1])
    way = delta_rule_way(name, kernel, call.plan)
    call.ran_by(way.name)
    return call.carry(inputs, lambda state: way.run(inputs, call.plan, state, use_qk_l2norm_in_kernel)), None


def _mamba2_scan(
    call: MixerCall,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> torch.Tensor:
    call.ran_by(TORCH_SCAN)

    def run(state: torch.Tensor | None) -> Handover:
        return tree_mamba2_scan(
            hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, plan=call.plan, initial=state
        )

    return call.carry((hidden_states, dt, A, B, C), run)


def _selective_scan(
    call: MixerCall,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> torch.Tensor:
    call.ran_by(TORCH_SCAN)

    def run(state: torch.Tensor | None) -> Handover:
        return tree_selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, plan=call.plan, initial=state
        )

    return call.carry((hidden_states, dt, A, B, C), run)


def _no_shortcut(*_: Any, **__: Any) -> None:
    """Where no kernels are installed, a mixer's shortcut past its own functions gives None."""


@dataclass(frozen=True, slots=True)
class Operation:
    """run: the stand-in. carries_state: whether the function does; others are shortcuts past those that do."""

    run: Callable[..., Any]
    carries_state: bool = True


OPERATIONS: dict[str, Operation] = {
    "causal_conv1d_fn": Operation(_convolution),
    "torch_chunk_gated_delta_rule": Operation(partial(_delta_rule, GATED_DELTA_RULE)),
    "chunk_gated_delta_rule": Operation(partial(_delta_rule, GATED_DELTA_RULE)),
    "chunk_kimi_delta_attention": Operation(partial(_delta_rule, KDA)),
    "mamba2_chunk_scan": Operation(_mamba2_scan),
    "mamba_selective_scan": Operation(_selective_scan),
    "mamba2_split_conv1d_scan_combined": Operation(_no_shortcut, carries_state=False),
    "mamba_inner_fn": Operation(_no_shortcut, carries_state=False),
}
