"""What attention is worth on a device: does it pass its self-check, and how fast is it beside a matrix product there.

`dta doctor` prints it; `device_report` gives the same as JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dta_plugin.attention.api import tree_attention, triton_obstacle
from dta_plugin.attention.mask import TreeMask
from dta_plugin.attention.self_check import Kind, Outcome, device_name, self_check
from dta_plugin.tree.layout import TreeLayout
from dta_plugin.tree.trie import PrefixTree

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_DIM, _GROUPS = 128, 4


@dataclass(frozen=True, slots=True)
class Load:
    """A star of `branches` rollouts, the heads that attend over it, and the side of the square matrices beside it."""

    dtype: torch.dtype
    prompt: int
    branches: int
    branch: int
    kv_heads: int
    side: int

    def tree(self) -> PrefixTree:
        prompt = np.arange(self.prompt)
        return PrefixTree.from_sequences(
            [np.concatenate([prompt, np.arange(self.branch) + (i + 1) * self.branch]) for i in range(self.branches)]
        )


_ON_GPU = Load(torch.bfloat16, prompt=8192, branches=16, branch=1024, kv_heads=8, side=8192)
_ON_CPU = Load(torch.float32, prompt=256, branches=4, branch=64, kv_heads=1, side=512)


@dataclass(frozen=True, slots=True)
class Rate:
    """TFLOP/s of attention, forward and backward, counted on visible pairs, and of a large matrix product."""

    backend: str
    dtype: str
    head_dim: int
    tree_tokens: int
    forward: float
    backward: float
    matrix_product: float


def device_report(device: torch.device, seconds: float = 5.0) -> dict[str, Any]:
    """For JSON: device, why the kernels cannot serve it or None, their checks per dtype, and the rate.

    seconds: what the measurement may take once everything is compiled.
    """
    return {
        "device": device_name(device),
        "obstacle": obstacle(device),
        "checks": [outcome.as_dict() for outcome in checks(device)],
        "rate": asdict(rate(device, seconds)),
    }


def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot serve the device, or None."""
    return triton_obstacle(device, _DTYPES[0], (_HEAD_DIM, _HEAD_DIM))


def checks(device: torch.device) -> list[Outcome]:
    """Of the kernels, for every dtype that they serve; none where they do not serve the device."""
    dims = (_HEAD_DIM, _HEAD_DIM)
    served = [dtype for dtype in _DTYPES if triton_obstacle(device, dtype, dims) is None]
    return [self_check(Kind(device, dtype, dims, _GROUPS)) for dtype in served]


def rate(device: torch.device, seconds: float) -> Rate:
    """Measured with the backend that "auto" means there."""
    load = _ON_GPU if device.type == "cuda" else _ON_CPU
    tree = load.tree()
    mask = TreeMask.from_layout(TreeLayout.from_tree(tree, device))
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        shape = (1, heads, tree.tree_tokens, _HEAD_DIM)
        return torch.randn(shape, generator=generator).to(device, load.dtype).requires_grad_()

    q, k, v = (random(heads * load.kv_heads) for heads in (_GROUPS, 1, 1))
    matrix = torch.randn(load.side, load.side, generator=generator).to(device, load.dtype)
    out = tree_attention(q, k, v, mask)
    weight = torch.ones_like(out)
    product = 4 * _GROUPS * load.kv_heads * _HEAD_DIM * tree.visible_pairs()  # FLOPs of Q K' and P V

    def forward() -> None:
        with torch.no_grad():
            tree_attention(q, k, v, mask)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)

    def multiply() -> None:
        torch.mm(matrix, matrix)

    flops = (product, 2.5 * product, 2 * load.side**3)
    speeds = [
        count / _seconds(run, device, seconds / 3) / 1e12
        for run, count in zip((forward, backward, multiply), flops, strict=True)
    ]
    used = "+".join(sorted(mask.backends_used))
    return Rate(used, str(load.dtype).removeprefix("torch."), _HEAD_DIM, tree.tree_tokens, *speeds)


def _seconds(run: Callable[[], None], device: torch.device, budget: float) -> float:
    """Of one run, on average over as many as fit the budget, and at least one after the first."""
    run()
    count, elapsed = 1, _timed(run, device, 1)
    if elapsed < budget:
        count = max(1, int(budget / elapsed))
        elapsed = _timed(run, device, count)
    return elapsed / count


def _timed(run: Callable[[], None], device: torch.device, count: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
