"""Tile sizes and launch options of the Triton kernels, per GPU generation, element size and head width."""

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


def launches(arch: int, element_size: int, width: int) -> Launches:
    """arch: 10 * compute capability, such as 90. element_size: bytes. width: head dim, rounded up to a power of 2."""
    return Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2))
