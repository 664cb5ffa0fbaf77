"""Tile sizes and launch options of the Triton kernels, per GPU generation, element size and head width.

How they were found: candidates were compiled for every generation without a GPU (tests/support/offline.py) and judged
by the machine code. No loop may compute anything twice or wait for more than its products; in 16 bits at widths 64 and
128 no kernel may spill a register; shared memory must fit the smallest GPU that a row serves; of what is left, what a
model of the multiprocessor takes for fastest (docs/kernels.md). tests/attention/test_compile.py holds them to it. None
of them has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched: rows of Q and of K/V per tile, warps per program, depth of the load pipeline.

    described: K and V are read through tensor descriptors (Hopper's TMA), which take the addresses off the threads.
    """

    query_tile: int
    key_tile: int
    warps: int
    stages: int
    described: bool = False


@dataclass(frozen=True, slots=True)
class Launches:
    """One `Launch` per kernel. value_gradient: None where keys and values get their gradients in one pass."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch
    value_gradient: Launch | None = None

    def key_passes(self) -> list[tuple[Launch, bool, bool]]:
        """(launch, gradients of keys, gradients of values) of each pass over the key tiles."""
        if self.value_gradient is None:
            return [(self.key_gradient, True, True)]
        return [(self.value_gradient, False, True), (self.key_gradient, True, False)]


# For 16-bit elements, by matrix unit and head width: forward, gradient of queries, of keys, and of values where that is
# a pass of its own. "mma" serves A100; "small mma" consumer GPUs, with their 99 KiB of shared memory, where heads are
# wide. Hopper's "wgmma" takes 64 rows per 4 warps, rows of queries, or of keys in their gradient: with fewer, several
# groups of warps compute the same. At width 256 the gradients of keys and values do not fit into registers together, at
# 512 a program has half of its output's columns.
_HALF = {
    ("mma", 64): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("mma", 128): ((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
    ("mma", 256): ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("mma", 512): ((32, 32, 4, 2), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 2)),
    ("small mma", 256): ((64, 32, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 2)),
    ("small mma", 512): ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("wgmma", 64): ((128, 64, 4, 3), (64, 64, 4, 3, True), (128, 64, 4, 2)),
    ("wgmma", 128): ((128, 64, 8, 3), (128, 64, 8, 3, True), (64, 64, 4, 2)),
    ("wgmma", 256): ((128, 64, 8, 2), (128, 32, 8, 2, True), (32, 128, 8, 2), (64, 128, 8, 2)),
    ("wgmma", 512): ((64, 32, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 2)),
    ("tcgen05", 64): ((128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 8, 2)),
    ("tcgen05", 128): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("tcgen05", 256): ((128, 32, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)),
    ("tcgen05", 512): ((128, 32, 8, 1), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 2)),
}
# Where soft-caps, which keep two more values per score, need more registers than such a row leaves.
_HALF_SOFTCAP = {("wgmma", 64): ((128, 64, 4, 3), (64, 64, 4, 3, True), (64, 64, 4, 2))}
# For float32, by head width, on every GPU that has the shared memory. Exact products have no matrix unit and unroll
# into much code if tiles are large; TF32 takes the same tiles.
_SINGLE = {
    64: ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 2)),
    128: ((32, 32, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2)),
    256: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2)),
    512: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


@cache
def launches(arch: int, element_size: int, width: int, has_softcap: bool) -> Launches | None:
    """How to launch for such inputs; None where no row serves them.

    arch: 10 * compute capability, such as 90. element_size: bytes. width: head dim.
    """
    block = max(64, 1 << (width - 1).bit_length())
    unit = {9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma")
    if unit == "mma" and block > 128 and arch not in (80, 87):
        unit = "small mma"
    row: tuple[tuple[int, ...], ...] | None
    if element_size == 4:
        row = None if (unit, block) == ("small mma", 512) else _SINGLE.get(block)
    else:
        row = (has_softcap and _HALF_SOFTCAP.get((unit, block))) or _HALF.get((unit, block))
    return None if row is None else Launches(*(Launch(*figures) for figures in row))


def widest_head(arch: int, element_size: int) -> int:
    """The largest head dim that has a row."""
    return max(width for width in (64, 128, 256, 512) if launches(arch, element_size, width, has_softcap=False))
