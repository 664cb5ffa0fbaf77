"""Before kernels of ours are trusted on a machine: a small tree through them, forward and backward, against the truth.

Once per process and `Kind` of attention (device, dtype, head dims, variant), at its first use, milliseconds beside the
compilation that is due anyway. The truth and the budget are those of the kernels' tests (`attention/trial.py`). A
mismatch, or an error of the compiler or the launch, is one warning, and FlexAttention is used instead.

Every rank of a distributed job decides for itself: FlexAttention is as exact, only slower, so ranks need not agree.

The check runs in a thread of its own, because autocast, gradient mode, saved-tensor hooks, checkpointing's modes and
the like are a thread's: there it neither sees nor disturbs them. It draws from a generator of its own, and computes the
truth on the CPU, so it does not wait for autograd's device threads, one of which may be waiting for it.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dta_plugin.attention.function import accumulator, sink_gradient
from dta_plugin.attention.mask import TreeMask
from dta_plugin.attention.precision import allows_tf32
from dta_plugin.attention.reference import reference_attention
from dta_plugin.attention.trial import (
    FLOOR,
    Inputs,
    Options,
    Outputs,
    allowed_error,
    dense_in_own_dtype,
    relative_error,
)
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.layout import TreeLayout
from dta_plugin.tree.trie import PrefixTree

log = logging.getLogger("dta_plugin")

_WINDOW, _SOFTCAP = 48, 3.0
_VARIANTS = ("window", "softcap", "sinks", "blocks", "whole_blocks")


@dataclass(frozen=True, slots=True)
class Kind:
    """What of an attention call decides which kernels run.

    groups: query heads per key/value head. blocks: some attend both ways. whole_blocks: whatever the window.
    """

    device: torch.device
    dtype: torch.dtype
    head_dims: tuple[int, int]
    groups: int
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    blocks: bool = False
    whole_blocks: bool = False

    @classmethod
    def from_call(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: TreeMask,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> Kind:
        has_blocks = mask.reach is not None
        are_whole = has_blocks and window is not None and mask.rule == "whole"
        variant = (window is not None, softcap is not None, sinks is not None, has_blocks, are_whole)
        return cls(q.device, q.dtype, (q.shape[3], v.shape[3]), q.shape[1] // k.shape[1], *variant)

    def __str__(self) -> str:
        width, value_width = self.head_dims
        dims = f"head dim {width}" if width == value_width else f"head dims {width} and {value_width}"
        variant = [name for name in _VARIANTS if getattr(self, name)]
        words = [name.replace("_", " ") for name in variant]
        return ", ".join([_name(self.dtype), dims, f"{self.groups} query heads per key head", *words])

    def options(self) -> Options:
        kv_heads = 2 if self.groups <= 8 else 1
        return Options(
            q_heads=kv_heads * self.groups,
            kv_heads=kv_heads,
            head_dim=self.head_dims[0],
            value_dim=self.head_dims[1],
            scale=1.5 * self.head_dims[0] ** -0.5,
            window=_WINDOW if self.window else None,
            softcap=_SOFTCAP if self.softcap else None,
            sinks=self.sinks,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """error, allowed: relative, see `attention/trial.py`. problem: what is wrong, None if nothing is."""

    kind: Kind
    error: float
    allowed: float
    seconds: float
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kind = asdict(self.kind) | {"device": str(self.kind.device), "dtype": _name(self.kind.dtype)}
        return kind | {name: getattr(self, name) for name in ("error", "allowed", "seconds", "problem")}


_outcomes: dict[Kind, Outcome] = {}


def trusted_backend(asked: str, kind: Kind) -> str:
    """Who computes attention of this kind where the Triton kernels serve it: they, or FlexAttention if they fail here.

    asked: the backend's name in the config. Raises InvalidInputError for kernels that fail and were asked for by name.
    """
    outcome = _outcomes.get(kind)
    if outcome is None:
        if _is_recorded(kind.device):
            return "triton"
        outcome = self_check(kind)
        if outcome.problem is not None and asked != "triton":
            log.warning("dta: %s. FlexAttention is used instead; please report this.", outcome.problem)
    if outcome.problem is None:
        return "triton"
    if asked == "triton":
        raise InvalidInputError(f"backend='triton', but {outcome.problem}. Use backend='auto', and please report this.")
    return "flex"


def self_check(kind: Kind) -> Outcome:
    """Run the kernels on a small tree, the first time in this process that it is asked for.

    Raises torch.OutOfMemoryError where there is no memory to find out.
    """
    if kind not in _outcomes:
        with ThreadPoolExecutor(1, "dta self-check") as thread:
            _outcomes[kind] = thread.submit(_check, kind).result()
    return _outcomes[kind]


def _is_recorded(device: torch.device) -> bool:
    """Whether operations are traced or captured now, not run."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _check(kind: Kind) -> Outcome:
    start = time.perf_counter()
    options, tree = kind.options(), _tree()
    if kind.blocks:
        tree = replace(tree, reach=_reach(tree))
    masks = (TreeMask.from_layout(TreeLayout.from_tree(tree, x)) for x in ("cpu", kind.device))
    on_cpu, on_device = (mask.ruled("whole" if kind.whole_blocks else "windowed") for mask in masks)
    truth = Inputs(options, tree.tree_tokens, torch.float64).run(reference_attention, on_cpu)
    dense = Inputs(options, tree.tree_tokens, _rounds_as(kind.dtype)).run(dense_in_own_dtype, on_cpu)
    allowed = allowed_error(dense, truth)
    try:
        found = _of_kernels(Inputs(options, tree.tree_tokens, kind.dtype, kind.device), on_device)
        error = relative_error({name: x.cpu() for name, x in found.items()}, truth, FLOOR)
        wrong = (
            None if error <= allowed else f"differ from the reference by {error:.2g}, where {allowed:.2g} is allowed"
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever Triton, its compiler or the driver may raise
        error, wrong = float("inf"), f"fail with {type(failure).__name__}: {str(failure).strip()[:500]}"
    problem = None if wrong is None else f"the Triton kernels {wrong}, on {device_name(kind.device)} ({kind})"
    return Outcome(kind, error, allowed, time.perf_counter() - start, problem)


def _tree() -> PrefixTree:
    """Some 330 tokens: a prompt of several tiles, forks within tiles and at their borders, an end inside the tree."""
    generator = np.random.default_rng(0)
    paths = [generator.integers(1000, size=160)]
    for kept in (160, 160, 128, 100, 191, 170):
        parent = next(path for path in reversed(paths) if len(path) >= kept)
        paths.append(np.concatenate([parent[:kept], 1000 + generator.integers(1000, size=31)]))
    return PrefixTree.from_sequences(paths)


def _reach(tree: PrefixTree) -> np.ndarray:
    """int64 [T] Blocks that attend both ways, shorter and longer than the window, up to the nodes' ends."""
    reach = np.arange(1, tree.tree_tokens + 1)
    for start, stop in pairwise(tree.node_start.tolist()):
        for first in range(start + 5, stop, 90):
            end = min(first + 70, stop)
            reach[first:end] = end
    return reach


def _rounds_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the dense path that the kernels are measured by. TF32 has the mantissa of float16."""
    return torch.float16 if dtype == torch.float32 and allows_tf32() else dtype


def _of_kernels(inputs: Inputs, mask: TreeMask) -> Outputs:
    """Output and gradients as of `Inputs.run`, without autograd."""
    from dta_plugin.attention.triton_backend import TritonKernels

    o, x = inputs.options, inputs.leaves
    kernels, sinks = TritonKernels(mask, o.scale, o.window, o.softcap), x.get("sinks")
    out, lse = kernels.forward(x["q"], x["k"], x["v"], sinks)
    grad_k, grad_v = accumulator(x["k"]), accumulator(x["v"])
    grad_q = kernels.backward(x["out"], x["q"], x["k"], x["v"], out, lse, grad_k, grad_v)
    found = {"out": out, "q": grad_q, "k": grad_k.to(x["k"].dtype), "v": grad_v.to(x["v"].dtype)}
    return found if sinks is None else found | {"sinks": sink_gradient(x["out"], out, lse, sinks)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
