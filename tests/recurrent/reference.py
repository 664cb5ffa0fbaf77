"""The specification: every path from a root to a token's last descendant by itself, token by token, in float64.

Arguments and results are those of `convolution.py` and `delta_rule.py` in `dta_plugin/recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from dta_plugin.recurrent.plan import StatePlan

# (state, token) -> (state, out)
Step = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [1, D, T]; weight: [D, W]; bias: [D]; initial: [1, D, W - 1] -> [1, D, T], [K, D, W - 1]."""
    x, weight, initial = x.double(), weight.double(), _state(initial, (x.shape[1], weight.shape[1] - 1))

    def step(state: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = torch.cat([state, x[0, :, token, None]], 1)
        out = (window * weight).sum(1)
        out = out if bias is None else out + bias.double()
        return window[:, 1:], out if activation is None else getattr(F, activation)(out)

    out, states = _along_paths(plan, initial, step)
    return out.T.unsqueeze(0), states


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key: [1, T, Hk, Dk]; value: [1, T, Hv, Dv]; g, beta: [1, T, Hv] -> [1, T, Hv, Dv], [K, Hv, Dk, Dv]."""
    g = g.unsqueeze(-1).expand(*g.shape, key.shape[-1])
    return kda(query, key, value, g, beta, plan, initial, use_qk_l2norm_in_kernel)


def kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As above with g [1, T, Hv, Dk]."""
    heads, width = value.shape[2], key.shape[3]
    query, key = (x[0].double().repeat_interleave(heads // x.shape[2], 1) for x in (query, key))
    value, g, beta = (x[0].double() for x in (value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))

    def step(state: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * g[token].exp().unsqueeze(-1)
        new = beta[token, :, None] * (value[token] - torch.einsum("hk,hkv->hv", key[token], state))
        state = state + torch.einsum("hk,hv->hkv", key[token], new)
        return state, torch.einsum("hk,hkv->hv", query[token], state) * width**-0.5

    out, states = _along_paths(plan, _state(initial, (heads, width, value.shape[-1])), step)
    return out.unsqueeze(0), states


def paths(plan: StatePlan) -> Iterator[list[int]]:
    """The tokens of every path from a root down to a token without children."""
    parents = set(plan.parent.tolist())
    for token in range(len(plan)):
        if token not in parents:
            path = [token]
            while plan.parent[path[-1]] >= 0:
                path.append(int(plan.parent[path[-1]]))
            yield path[::-1]


def _along_paths(plan: StatePlan, initial: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """What `step` gives for every token, [T, ...], and the states behind the leaves of the plan, [K, ...]."""
    states: dict[int, torch.Tensor] = {}
    outs: dict[int, torch.Tensor] = {}
    for path in paths(plan):
        state = initial
        for token in path:
            state, out = step(state, token)
            states.setdefault(token, state)
            outs.setdefault(token, out)
    out = torch.stack([outs[token] for token in range(len(plan))])
    behind = [states[token] for token in plan.leaves.tolist()]
    return out, torch.stack(behind) if behind else initial.new_zeros(0, *initial.shape)


def _state(initial: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64) if initial is None else initial[0].double()
