"""Before FLA's kernels are trusted on a machine: a small tree through them, forward and backward, against torch.

Once per process, function, device, dtype and widths, at the first use, as for attention (`attention/self_check.py`). A
mismatch, or an error of the compiler or the launch, is one warning, and torch's functions run instead. Every rank
decides for itself: they are as exact, only slower.

The check runs in a thread of its own, which neither sees nor disturbs autocast, hooks and modes. Autograd computes on a
GPU in one thread: inside of a backward pass, which is that one, there is no check. The tree has two heads, whatever the
model has: FLA keeps the launch settings that were fastest at first for a number of heads, and the model's rows are to
decide these.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dta_plugin.recurrent.choice import TORCH_OPERATIONS
from dta_plugin.recurrent.convolution import tree_causal_conv1d
from dta_plugin.recurrent.fla import CONVOLUTION, KDA, Kernel, serving_kernel
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.varlen import Inputs, by_levels, by_paths
from dta_plugin.tree.trie import PrefixTree

log = logging.getLogger("dta_plugin")

# Of the largest entry of each output, state and gradient: rounding in half precision is several times less, and a state
# or a gradient that is lost at a fork several times more.
_ALLOWED = 0.05

Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def trusted_kernel(name: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Kernel | None:
    """FLA's function where it serves and computes what it should; else None. widths: of keys and values."""
    kernel = serving_kernel(name, device, dtype, *widths)
    if kernel is None or torch._C._current_graph_task_id() != -1:
        return kernel
    return None if _is_refused(kernel, name, device, dtype, widths) else kernel


@functools.cache
def _is_refused(kernel: Kernel, name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    with ThreadPoolExecutor(1, "dta self-check") as thread:
        problem = thread.submit(kernel_problem, kernel, name, device, dtype, widths).result()
    if problem is not None:
        log.warning(
            "dta: flash-linear-attention's %s (%s, widths %s) %s. torch's functions are used instead.",
            name,
            str(dtype).removeprefix("torch."),
            list(widths),
            problem,
        )
    return problem is not None


def kernel_problem(
    kernel: Kernel, name: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]
) -> str | None:
    """What is wrong with it, None if nothing is."""
    plan = _plan()
    inputs = _convolution_inputs(plan) if name == CONVOLUTION else _delta_rule_inputs(plan, name == KDA, *widths)
    rounded = [x.to(dtype) for x in inputs]
    expected = _outcome(_truth(name, plan), [x.double() for x in rounded])
    try:
        found = [_outcome(run, [x.to(device) for x in rounded]) for run in _ways(kernel, name, plan)]
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever Triton, its compiler, FLA or the driver may raise
        return f"fails with {type(failure).__name__}: {str(failure).strip()[:500]}"
    error = max(_error(a, b) for own in found for a, b in zip(own, expected, strict=True))
    return None if error <= _ALLOWED else f"differs from torch's functions by {error:.2g}, {_ALLOWED} is allowed"


def _plan() -> StatePlan:
    """Some 500 tokens: nodes longer and shorter than a kernel's chunks, three levels, two ends inside of the tree."""
    start, turn = [0] * 150, [1] * 70
    sequences = [start + turn + [2] * 90, start + turn + [3] * 2, start + [4] * 65, start[:5] + [5] * 130, [6] * 3]
    return StatePlan.from_depth(PrefixTree.from_sequences(sequences).depth, [149, 200])


def _ways(kernel: Kernel, name: str, plan: StatePlan) -> list[Run]:
    if name == CONVOLUTION:
        return [lambda x, weight, bias, state: tree_causal_conv1d(x, weight, bias, None, plan, state, kernel)]

    def run(way: Run, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decays and states are float32, as in models."""
        q, k, v, g, beta, state = given
        return way(kernel, Inputs(q, k, v, g.float(), beta), plan, state.float(), True)

    return [functools.partial(run, by_levels), functools.partial(run, by_paths)]


def _truth(name: str, plan: StatePlan) -> Run:
    if name == CONVOLUTION:
        return lambda x, weight, bias, state: tree_causal_conv1d(x, weight, bias, None, plan, state)
    rule: Run = TORCH_OPERATIONS[name]
    return lambda *x: rule(*x[:5], plan, x[5], True)


def _delta_rule_inputs(plan: StatePlan, is_kda: bool, width: int, out: int) -> list[torch.Tensor]:
    """Decays so slow that much of a state is left behind a node."""
    tokens, heads, random = len(plan), 2, _generator()
    g = -0.02 * random(1, tokens, heads, *([width] if is_kda else [])).exp()
    keys = [random(1, tokens, heads, width) for _ in range(2)]
    beta, state = random(1, tokens, heads).sigmoid(), random(1, heads, width, out)
    return [*keys, random(1, tokens, heads, out), g, beta, state]


def _convolution_inputs(plan: StatePlan) -> list[torch.Tensor]:
    channels, width, random = 64, 4, _generator()
    row = random(1, len(plan), channels).transpose(1, 2)
    return [row, random(channels, width), random(channels), random(1, channels, width - 1)]


def _generator() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _outcome(run: Run, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output, states, and the gradients that a fixed weighting of both leaves in all inputs; on the CPU."""
    given = [x.detach().requires_grad_() for x in inputs]
    results: tuple[Any, ...] = run(*given)
    weights = [(torch.arange(x.numel(), device=x.device) % 7 - 2).view(x.shape).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, given, weights)
    return [x.detach().cpu() for x in (*results, *gradients)]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))
