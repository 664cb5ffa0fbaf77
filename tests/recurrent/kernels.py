"""Stand-ins for FLA's functions, with their signatures: one sequence after the other, token by token, in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dta_plugin.recurrent.plan import StatePlan
from tests.recurrent import reference


class Kernel:
    """Of a rule. calls: the sequences and tokens of each call."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.calls: list[tuple[int, int]] = []

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        cu_seqlens_cpu: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert scale is None and cu_seqlens is not None and torch.equal(cu_seqlens, cu_seqlens_cpu)
        assert q.shape[2] == v.shape[2] and q.shape[1] == cu_seqlens[-1]
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        self.calls.append((len(cu_seqlens) - 1, q.shape[1]))
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            plan = StatePlan(np.arange(-1, stop - start - 1), np.array([stop - start - 1]))
            own = (x[:, start:stop] for x in (q, k, v, g, beta))
            initial = None if initial_state is None else initial_state[i : i + 1]
            out, state = self.rule(*own, plan, initial, use_qk_l2norm_in_kernel)
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states) if output_final_state else None


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FLA's `causal_conv1d`, [1, T, D], of one sequence without an activation."""
    plan = StatePlan(np.arange(-1, x.shape[1] - 1), np.array([], dtype=np.int64))
    bias = None if bias is None else bias.double()  # once, for gradients are summed in its dtype
    return reference.causal_conv1d(x.mT, weight, bias, None, plan)[0].mT, None
