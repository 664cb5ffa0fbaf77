"""The functions by which transformers' mixers carry state along a sequence, and what stands in for each on a tree.

A stand-in takes what the mixer's forward gives to the function, for one packed row, and the call that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from dta_plugin.attention.mask import TreeMask
from dta_plugin.errors import UnsupportedError
from dta_plugin.recurrent.convolution import tree_causal_conv1d
from dta_plugin.recurrent.delta_rule import tree_gated_delta_rule, tree_kda
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.selective_scan import tree_selective_scan
from dta_plugin.recurrent.state_space import tree_mamba2_scan

Handover = tuple[torch.Tensor, torch.Tensor]  # what a function gives, and the states that leave the row


class MixerCall:
    """One call of a mixer with a tree."""

    def __init__(self, tree: TreeMask, mixer: nn.Module) -> None:
        self.plan: StatePlan = tree.state_plan()
        self.states = tree.states
        self._mixer, self._number = mixer, tree.state_call_number(id(mixer))
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
        out, states = run(self.states.enter(key, inputs))
        return self.states.leave(key, out, states)

    def check_carried(self, names: Iterable[str]) -> None:
        """Raises UnsupportedError where a mixer has not called some of its known functions."""
        missing = {name for name in names if OPERATIONS[name].carries_state}.difference(self._asked)
        if missing:
            raise UnsupportedError(
                f"{type(self._mixer).__name__} did not call {', '.join(sorted(missing))}, by which it carries its "
                "state. Expected it to; switch off whatever replaces its forward, or use on_unsupported='dense'."
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
    return call.carry((x, weight), lambda state: tree_causal_conv1d(x, weight, bias, act, call.plan, state))


def _gated_delta_rule(
    call: MixerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    def run(state: torch.Tensor | None) -> Handover:
        return tree_gated_delta_rule(query, key, value, g, beta, call.plan, state, use_qk_l2norm_in_kernel)

    return call.carry((query, key, value, g, beta), run), None


def _kimi_delta_attention(
    call: MixerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    def run(state: torch.Tensor | None) -> Handover:
        return tree_kda(query, key, value, g, beta, call.plan, state, use_qk_l2norm_in_kernel)

    return call.carry((query, key, value, g, beta), run), None


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
    "torch_chunk_gated_delta_rule": Operation(_gated_delta_rule),
    "chunk_gated_delta_rule": Operation(_gated_delta_rule),
    "chunk_kimi_delta_attention": Operation(_kimi_delta_attention),
    "mamba2_chunk_scan": Operation(_mamba2_scan),
    "mamba_selective_scan": Operation(_selective_scan),
    "mamba2_split_conv1d_scan_combined": Operation(_no_shortcut, carries_state=False),
    "mamba_inner_fn": Operation(_no_shortcut, carries_state=False),
}
