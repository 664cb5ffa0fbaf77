"""Do the ops that the benchmark times compute the same? Each is compared with dense attention on a small tree."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.attention.contenders import Attend, Setting, dense_attend, reason, tree_attend, varlen_attend
from benchmarks.common.workloads import star, unrelated
from dta_plugin import PrefixTree

TOLERANCE = 2e-2  # relative L2 error in 16 bit
VOCAB = 1024


class Disagreement(Exception):
    """An op that is not attention over its tree."""


def errors_to_dense(setting: Setting) -> dict[str, float | str]:
    """Per op its error, or why it cannot run here. Raises Disagreement where one is wrong."""
    shared = PrefixTree.from_sequences(star(300, 90, 4, VOCAB).sequences)
    rows = unrelated(0, 300, 3, VOCAB).sequences
    apart = PrefixTree.from_sequences([row[: 130 + 70 * index] for index, row in enumerate(rows)])
    in_layout_order = np.diff(apart.offsets)[apart.order].tolist()
    trials: dict[str, tuple[PrefixTree, Callable[[], Attend]]] = {
        "tree": (shared, lambda: tree_attend(shared, setting.device, setting.tree_backend)),
        "flex": (shared, lambda: tree_attend(shared, setting.device, "flex")),
        "varlen flash": (apart, lambda: varlen_attend(in_layout_order, setting.device)),
    }
    errors: dict[str, float | str] = {}
    for name, (tree, attend) in trials.items():
        try:
            errors[name] = error = disagreement(attend(), tree, setting)
        except Exception as exception:
            if name == "tree":
                raise
            errors[name] = reason(exception)
            continue
        if not error <= TOLERANCE:
            raise Disagreement(
                f"{name} differs from dense attention by {error:.1e}, the largest relative L2 error of output and "
                f"gradients. Expected at most {TOLERANCE:.0e}; its timings would mean nothing."
            )
    return errors


def disagreement(attend: Attend, tree: PrefixTree, setting: Setting) -> float:
    """Largest relative L2 error of output, dq, dk and dv to dense SDPA, one sequence at a time; infinite for NaN.

    attend: takes q, k, v in the tree's layout.
    """
    q, k, v, grad = (
        torch.randn(1, tree.tree_tokens, heads, setting.head_dim, device=setting.device).transpose(1, 2)
        for heads in (setting.query_heads, setting.kv_heads, setting.kv_heads, setting.query_heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]  # float32, so that dense gradients of shared keys are summed in it
    paths = [torch.from_numpy(tree.path(s)).to(setting.device) for s in range(tree.num_sequences)]
    first = torch.from_numpy(np.unique(tree.paths, return_index=True)[1]).to(setting.device)

    def dense() -> torch.Tensor:
        outs = [dense_attend(*(x[:, :, path].to(setting.dtype) for x in leaves)) for path in paths]
        return torch.cat(outs, dim=2)[:, :, first]

    actual, expected = (
        (out.detach(), *torch.autograd.grad(out, leaves, grad.to(setting.dtype)))
        for out in (attend(*(x.to(setting.dtype) for x in leaves)), dense())
    )
    errors = [
        ((a.double() - e.double()).norm() / e.double().norm()).item() for a, e in zip(actual, expected, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)
