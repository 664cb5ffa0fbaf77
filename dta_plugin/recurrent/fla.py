"""The kernels of flash-linear-attention (`fla`), where it is installed and they serve: NVIDIA GPUs and half precision.

Nothing is imported before a tensor asks that they could serve. float32 and float64 stay with torch, which computes
them as exactly as it can; the kernels' products are TF32's.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

log = logging.getLogger("dta_plugin")

# chunk_gated_delta_rule, chunk_kda or causal_conv1d, with FLA's signature.
Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

GATED_DELTA_RULE, KDA, CONVOLUTION = "chunk_gated_delta_rule", "chunk_kda", "causal_conv1d"

_FILES = {
    GATED_DELTA_RULE: ("fla.ops.gated_delta_rule",),
    KDA: ("fla.ops.kda",),
    CONVOLUTION: ("fla.modules.causal_conv1d", "fla.modules.convolution"),  # since 0.6, and before
}
_RELEASES = ("0.4", "0.5", "0.6")
_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256


def serving_kernel(name: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Kernel | None:
    """FLA's function, or None where it does not serve tensors of this kind. widths: of keys and values."""
    is_served = device.type == "cuda" and torch.version.hip is None and dtype in _DTYPES
    return _imported(name) if is_served and all(w % 16 == 0 and w <= _WIDEST for w in widths) else None


@functools.cache
def _imported(name: str) -> Kernel | None:
    release = _release()
    if release is None:
        return None
    if ".".join(release.split(".")[:2]) not in _RELEASES:
        log.warning(
            "dta: flash-linear-attention %s is installed, and its kernels are known in %s: recurrent layers run on "
            "torch's functions.",
            release,
            ", ".join(_RELEASES),
        )
        return None
    failures: list[str] = []
    for file in _FILES[name]:
        try:
            found: Kernel = getattr(importlib.import_module(file), name)
        except Exception as failure:  # whatever FLA raises with a Triton that it does not know
            failures.append(f"{type(failure).__name__}: {failure}")
        else:
            return found
    log.warning(
        "dta: %s of flash-linear-attention %s cannot be imported (%s): torch's functions run.",
        name,
        release,
        "; ".join(failures),
    )
    return None


def _release() -> str | None:
    for package in ("fla-core", "flash-linear-attention"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
