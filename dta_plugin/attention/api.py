"""`tree_attention`: attention over a prefix tree in depth-first layout. Checks its arguments and picks a backend."""

from __future__ import annotations

import torch

from dta_plugin.attention.mask import TreeMask
from dta_plugin.config import BACKENDS
from dta_plugin.errors import InvalidInputError


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that serves `backend` on `device`. Raises InvalidInputError where it cannot run there."""
    if backend not in BACKENDS:
        raise InvalidInputError(f"backend={backend!r}. Expected one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        return "cpu" if device.type == "cpu" else "flex"
    if backend == "triton":
        raise InvalidInputError(
            "backend='triton', but this version ships no Triton kernels yet. Use backend='auto': FlexAttention on "
            "GPUs, the native path on CPUs."
        )
    if backend == "cpu" and device.type != "cpu":
        raise InvalidInputError(f"backend='cpu' with tensors on {device}. Use backend='auto' there.")
    if backend == "flex" and device.type == "cpu":
        raise InvalidInputError(
            "backend='flex' with tensors on the CPU, where FlexAttention has no backward. Use backend='auto' there."
        )
    return backend


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tree-causal attention, differentiable in q, k, v and sinks.

    q: [1, Hq, T, D]. k: [1, Hkv, T, D]. v: [1, Hkv, T, Dv], Hq a multiple of Hkv (grouped-query attention).
    mask: visibility of the T layout tokens, and the backend.
    scale: factor on q.k, default D ** -0.5. window: a query sees keys less than `window` tokens up its own path.
    softcap: scores become ``softcap * tanh(scores / softcap)``. sinks: [Hq] one extra logit per head that takes
        probability and gives no value (GPT-OSS).

    Returns [1, Hq, T, Dv] in q's dtype. Raises InvalidInputError for shapes, dtypes or backends that do not fit.
    """
    _check(q, k, v, mask, window, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve_backend(mask.backend, q.device)
    if backend == "cpu":
        from dta_plugin.attention.cpu import cpu_attention as run
    elif backend == "flex":
        from dta_plugin.attention.flex import flex_tree_attention as run
    else:
        from dta_plugin.attention.reference import reference_attention as run
    return run(q, k, v, mask, scale, window, softcap, sinks)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask, window: int | None, sinks: torch.Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mask of {len(mask)} tokens"
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0] == v.shape[0] == 1
        and q.shape[2] == k.shape[2] == v.shape[2] == len(mask)
        and q.shape[3] == k.shape[3]
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise InvalidInputError(
            f"Got {shapes}. Expected q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] with Hq a multiple of Hkv "
            "and T the mask's length; pack the tree's tokens as one row (see TreeLayout)."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidInputError(
            f"Got dtypes {q.dtype}, {k.dtype}, {v.dtype} for q, k, v. Expected one dtype; cast first."
        )
    if window is not None and window < 1:
        raise InvalidInputError(f"Got window={window}. Expected None or at least 1.")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise InvalidInputError(
            f"Got sinks of shape {tuple(sinks.shape)}. Expected one per query head: ({q.shape[1]},)."
        )
