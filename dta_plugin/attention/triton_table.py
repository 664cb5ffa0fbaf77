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


# For 16-bit elements, by matrix instruction and head width. "mma" serves A100, "small mma" consumer GPUs, with their 99 KiB
# of shared memory. Hopper's "wgmma" takes 64 rows per 4 warps: rows of queries, or of keys in the keys' gradient; with
# fewer rows than that per group of warps, several groups compute the same. At width 256 the gradients of keys and values
# do not fit into registers together; at 512 a program has half of the
# columns of its output.
_HALF = {
    ("mma", 64): Launches(Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    ("mma", 128): Launches(Launch(128, 64, 8, 2), Launch(64, 32, 4, 2), Launch(64, 64, 8, 2)),
    ("mma", 256): Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2), Launch(32, 64, 4, 2)),
    ("small mma", 256): Launches(
        Launch(64, 32, 4, 2), Launch(64, 32, 4, 1), Launch(32, 64, 4, 1), Launch(32, 64, 4, 2)
    ),
    ("mma", 512): Launches(Launch(32, 32, 4, 2), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1), Launch(16, 32, 4, 2)),
    ("small mma", 512): Launches(
        Launch(16, 32, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)
    ),
    ("wgmma", 64): Launches(Launch(128, 64, 4, 3), Launch(64, 64, 4, 3, described=True), Launch(128, 64, 4, 2)),
    ("wgmma", 128): Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3, described=True), Launch(64, 64, 4, 2)),
    ("wgmma", 256): Launches(
        Launch(128, 64, 8, 2), Launch(128, 32, 8, 2, described=True), Launch(32, 128, 8, 2), Launch(64, 128, 8, 2)
    ),
    ("wgmma", 512): Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 1), Launch(32, 64, 4, 1), Launch(32, 64, 4, 2)),
    ("tcgen05", 64): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 4, 2), Launch(64, 128, 8, 2)),
    ("tcgen05", 128): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
    ("tcgen05", 256): Launches(
        Launch(128, 32, 8, 2), Launch(128, 32, 8, 2), Launch(32, 128, 8, 2), Launch(64, 128, 8, 2)
    ),
    ("tcgen05", 512): Launches(Launch(128, 32, 8, 1), Launch(64, 32, 4, 1), Launch(32, 64, 4, 1), Launch(32, 64, 4, 2)),
}
# Soft-caps keep two more values per score, which costs registers.
_HALF_SOFTCAP = {
    ("wgmma", 64): Launches(Launch(128, 64, 4, 3), Launch(64, 64, 4, 3, described=True), Launch(64, 64, 4, 2))
}
# For float32, by head width, on every GPU. Exact products have no matrix unit and unroll into much code if tiles are
# large; TF32 takes the same tiles.
_SINGLE = {
    64: Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(16, 32, 8, 2)),
    128: Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 2), Launch(16, 32, 8, 2)),
    256: Launches(Launch(16, 32, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 2)),
    512: Launches(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
}


def launches(arch: int, element_size: int, width: int, has_softcap: bool) -> Launches | None:
    """How to launch for such inputs; None where no row fits.

    arch: 10 * compute capability, such as 90. element_size: bytes. width: head dim.
    """
    block = max(64, 1 << (width - 1).bit_length())
    unit = {9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma")
    if unit == "mma" and block > 128 and arch not in (80, 87):
        unit = "small mma"
    if element_size == 4:
        return None if (unit, block) == ("small mma", 512) else _SINGLE.get(block)
    return (has_softcap and _HALF_SOFTCAP.get((unit, block))) or _HALF.get((unit, block))


def widest_head(arch: int, element_size: int) -> int:
    """The largest head dim that has a row."""
    return max(width for width in (64, 128, 256, 512) if launches(arch, element_size, width, has_softcap=False))
