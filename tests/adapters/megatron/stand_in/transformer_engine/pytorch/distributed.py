"""Names that Megatron imports, and uses with fp8 and CUDA graphs only."""

from __future__ import annotations

from contextlib import AbstractContextManager


class CudaRNGStatesTracker: ...


def activation_recompute_forward(activation_recompute: bool, recompute_phase: bool) -> AbstractContextManager[None]:
    raise NotImplementedError("of fp8")
