"""One Triton kernel of the attention op by itself: its launches timed, its row of the launch table replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from benchmarks.common.harness import mark, milliseconds, synchronize
from dta_plugin import PrefixTree, TreeMask
from dta_plugin.tree.layout import TreeLayout

Row = tuple[int, ...]
LAUNCH = ("query_tile", "key_tile", "warps", "stages")  # what a row says


class Clock:
    """Stands for a kernel of Triton's in the module that launches it, and marks the time around every launch."""

    def __init__(self, kernel: Any, marks: list[tuple[Any, Any]], device: torch.device) -> None:
        self.kernel, self.marks, self.device = kernel, marks, device

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            start = mark(self.device)
            self.kernel[grid](*arguments, **options)
            self.marks.append((start, mark(self.device)))

        return launch


@contextmanager
def timed(module: ModuleType, device: torch.device) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Marks around the launches of every kernel that `module` names, by that name."""
    from triton.runtime.jit import KernelInterface

    kernels = {name: value for name, value in vars(module).items() if isinstance(value, KernelInterface)}
    marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for name, kernel in kernels.items():
        setattr(module, name, Clock(kernel, marks[name], device))
    try:
        yield marks
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


@dataclass(eq=False)
class Bench:
    """One head dim on one tree: inputs, and what the table's rows compute."""

    dim: int
    sequences: list[torch.Tensor]
    device: torch.device
    heads: tuple[int, int] = (32, 8)
    dtype: torch.dtype = torch.bfloat16
    mask: TreeMask = field(init=False)
    pairs: int = field(init=False)
    inputs: list[torch.Tensor] = field(init=False)  # q, k, v, the output's gradient

    def __post_init__(self) -> None:
        tree = PrefixTree.from_sequences(self.sequences)
        self.mask = TreeMask.from_layout(TreeLayout.from_tree(tree, self.device), "triton")
        self.pairs = tree.visible_pairs()
        query, kv = self.heads
        self.inputs = [
            torch.randn(1, len(self.mask), heads, self.dim, device=self.device, dtype=self.dtype).transpose(1, 2)
            for heads in (query, kv, kv, query)
        ]

    @cached_property
    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exps, with the table's row."""
        return self._kernels().forward(*self.inputs[:3], None)

    def run(self, kernel: str, row: Row | None) -> tuple[list[torch.Tensor], float, Row]:
        """The kernel's results with this row, None for the table's; milliseconds of its own launches; the row."""
        from dta_plugin.attention import triton_backend

        q, k, v, grad = self.inputs
        out, lse = self.forward
        sums = [torch.zeros(x.shape, device=self.device) for x in (k, v)]
        with launched_with(kernel, row) as taken, timed(triton_backend, self.device) as marks:
            if kernel == "forward":
                results = [self._kernels().forward(q, k, v, None)[0]]
            else:
                grad_q = self._kernels().backward(grad, q, k, v, out, lse, *sums)
                results = [grad_q] if kernel == "query_gradient" else sums
            synchronize(self.device)
            own = [pair for name, pairs in marks.items() if _kind(name) == kernel for pair in pairs]
            return results, sum(milliseconds(*pair) for pair in own), taken[0]

    def _kernels(self) -> Any:
        from dta_plugin.attention.triton_backend import TritonKernels

        return TritonKernels(self.mask, self.dim**-0.5, None, None)


def _kind(name: str) -> str:
    """The row of the launch table that a kernel takes. `delta` takes none: all of the backward pass needs it."""
    first = (kind for kind in ("forward", "query_gradient", "delta") if name.startswith(kind))
    return next(first, "key_gradient")


@contextmanager
def launched_with(kernel: str, row: Row | None) -> Iterator[list[Row]]:
    """The launch table with another row for one kernel; the rows that this kernel then took."""
    from dta_plugin.attention import triton_backend

    known = triton_backend.launches
    taken: list[Row] = []

    def changed(*where: Any) -> Any:
        rows = known(*where)
        launch = getattr(rows, kernel)
        if row is not None:
            launch = replace(launch, **dict(zip(LAUNCH, row, strict=True)))
        taken.append(tuple(getattr(launch, name) for name in LAUNCH))
        return replace(rows, **{kernel: launch})

    triton_backend.launches = changed
    try:
        yield taken
    finally:
        triton_backend.launches = known
