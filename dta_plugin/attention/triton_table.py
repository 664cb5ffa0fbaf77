"""Tile sizes and launch options of the Triton kernels, per GPU generation, element size and head width.

How they were found: candidates were compiled for every generation without a GPU (tests/support/offline.py) and judged
by what the compiler reports. In 16 bits at widths 64 and 128 no kernel may spill a register; shared memory
must fit the smallest GPU that a row serves; of what is left, the largest tiles that keep the generation's matrix
instruction, or ones of which two programs fit on a multiprocessor. tests/attention/test_compile.py holds them to it.
None of them has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched: rows of Q and of K/V per tile, warps per program, depth of the load pipeline."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launches:
    """One `Launch` per kernel."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch


# For 16-bit elements, by matrix instruction and head width. "mma" serves A100 and all consumer GPUs, with their 99 KiB
# of shared memory. Hopper's "wgmma" takes 64 rows per 4 warps: rows of queries, or of keys in the keys' gradient.
_HALF = {
    ("mma", 64): Launches(Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    ("mma", 128): Launches(Launch(128, 64, 8, 2), Launch(64, 32, 4, 2), Launch(64, 64, 8, 2)),
    ("mma", 256): Launches(Launch(64, 32, 4, 2), Launch(64, 32, 8, 1), Launch(16, 64, 8, 2)),
    ("wgmma", 64): Launches(Launch(128, 64, 4, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
    ("wgmma", 128): Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 64, 8, 3)),
    ("wgmma", 256): Launches(Launch(128, 64, 8, 2), Launch(128, 32, 8, 2), Launch(16, 64, 8, 2)),
    ("tcgen05", 64): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 4, 2), Launch(64, 128, 8, 2)),
    ("tcgen05", 128): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
    ("tcgen05", 256): Launches(Launch(128, 32, 8, 2), Launch(128, 32, 8, 2), Launch(32, 64, 8, 1)),
}
# For float32, by head width, on every GPU. Exact products have no matrix unit and unroll into much code if tiles are
# large; TF32 takes the same tiles.
_SINGLE = {
    64: Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(16, 32, 8, 2)),
    128: Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 2), Launch(16, 32, 8, 2)),
    256: Launches(Launch(16, 32, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 2)),
}


def launches(arch: int, element_size: int, width: int) -> Launches:
    """arch: 10 * compute capability, such as 90. element_size: bytes. width: head dim, rounded up to a power of 2."""
    width = max(width, 64)
    return _SINGLE[width] if element_size == 4 else _HALF[_matrix_instruction(arch), width]


def _matrix_instruction(arch: int) -> str:
    """That of Hopper, of datacenter Blackwell, or the one that every GPU has, with the most modest tiles."""
    return {9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma")
