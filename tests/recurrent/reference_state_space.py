"""What the scans of state-space layers on a tree are, token by token in float64: the specification, and slow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dta_plugin.recurrent.plan import StatePlan

Update = Callable[[int, torch.Tensor], torch.Tensor]


def _states(plan: StatePlan, initial: torch.Tensor, update: Update) -> list[torch.Tensor]:
    """The state behind every token: each updates its parent's."""
    states: list[torch.Tensor] = []
    for token, parent in enumerate(plan.parent.tolist()):
        states.append(update(token, states[parent] if parent >= 0 else initial))
    return states


def _behind_leaves(plan: StatePlan, states: list[torch.Tensor], initial: torch.Tensor) -> torch.Tensor:
    leaves = [states[leaf] for leaf in plan.leaves.tolist()]
    return torch.stack(leaves) if leaves else initial.new_zeros(0, *initial.shape)


def mamba2_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `tree_mamba2_scan`."""
    x, step, A, B, C = (tensor.double() for tensor in (hidden_states[0], dt[0], A, B[0], C[0]))
    step = step if dt_bias is None else step + dt_bias.double()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    heads, width = x.shape[1:]
    B, C = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))  # [T, H, N]
    start = x.new_zeros(heads, width, B.shape[-1]) if initial is None else initial[0].double()

    def update(t: int, state: torch.Tensor) -> torch.Tensor:
        kept = (step[t] * A).exp()[:, None, None] * state
        return kept + step[t][:, None, None] * x[t][:, :, None] * B[t][:, None, :]

    states = _states(plan, start, update)
    out = torch.stack([(state * C[t][:, None, :]).sum(-1) for t, state in enumerate(states)])
    out = out if D is None else out + D.double()[:, None] * x
    out = out if z is None else out * F.silu(z[0].double())
    return out[None], _behind_leaves(plan, states, start)


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `tree_selective_scan`."""
    x, step, A, B, C = (tensor.double() for tensor in (hidden_states[0].T, dt[0].T, A, B[0].T, C[0].T))
    step = step if delta_bias is None else step + delta_bias.double()
    step = F.softplus(step) if delta_softplus else step
    start = torch.zeros_like(A) if initial is None else initial[0].double()

    def update(t: int, state: torch.Tensor) -> torch.Tensor:
        return (step[t][:, None] * A).exp() * state + (step[t] * x[t])[:, None] * B[t]

    states = _states(plan, start, update)
    out = torch.stack([state @ C[t] for t, state in enumerate(states)])
    out = out if D is None else out + D.double() * x
    out = out if z is None else out * F.silu(z[0].T.double())
    return out.T[None], _behind_leaves(plan, states, start)
