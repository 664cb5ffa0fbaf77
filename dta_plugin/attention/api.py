"""`tree_attention`: attention over a prefix tree in depth-first layout. Checks its arguments and picks a backend."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dta_plugin.attention.mask import TreeMask
from dta_plugin.attention.self_check import Kind, trusted_backend
from dta_plugin.attention.triton_table import launches, widest_head
from dta_plugin.config import BACKENDS
from dta_plugin.errors import InvalidInputError


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]) -> str:
    """Who computes attention when `backend` is asked for: "auto" takes the fastest that serves these inputs.

    head_dims: of keys and values.

    Raises InvalidInputError for a backend that cannot.
    """
    if backend not in BACKENDS:
        raise InvalidInputError(f"backend={backend!r}. Expected one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        return "flex" if triton_obstacle(device, dtype, head_dims) else "triton"
    if backend == "triton" and (reason := triton_obstacle(device, dtype, head_dims)):
        raise InvalidInputError(f"backend='triton', but {reason}. Use backend='auto' there.")
    if backend == "cpu" and device.type != "cpu":
        raise InvalidInputError(f"backend='cpu' with tensors on {device}. Use backend='auto' there.")
    if backend == "flex" and device.type == "cpu":
        raise InvalidInputError(
            "backend='flex' with tensors on the CPU, where FlexAttention has no backward. Use backend='auto' there."
        )
    return backend


def serving_backend(backend: str, kind: Kind) -> str:
    """Who computes attention of this kind: as `resolve_backend`, and kernels that fail their self-check do not."""
    resolved = resolve_backend(backend, kind.device, kind.dtype, kind.head_dims)
    return trusted_backend(backend, kind) if resolved == "triton" else resolved


def triton_obstacle(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]) -> str | None:
    """What keeps the Triton kernels from serving such inputs, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {device} and the kernels need an NVIDIA GPU"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability} and the kernels need (8, 0)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the tensors are {dtype} and the kernels serve float16, bfloat16 and float32"
    arch = 10 * capability[0] + capability[1]
    for head_dim in head_dims:
        if head_dim % 16 or launches(arch, dtype.itemsize, head_dim, has_softcap=False) is None:
            widest = widest_head(arch, dtype.itemsize)
            return f"the head dim is {head_dim} and the kernels serve multiples of 16 up to {widest}"
    return None


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

    Query i sees key j iff ``j <= i < exit[j]``; where blocks of tokens attend both ways, iff ``j < reach[i]`` and
    ``i < exit[j]``. The queries are the last Tq of the layout's T tokens: all of them, or a
    chunk whose ancestors' keys come first.

    Args:
        q: [1, Hq, Tq, D].
        k: [1, Hkv, T, D] in q's dtype; Hq is a multiple of Hkv (grouped-query attention).
        v: [1, Hkv, T, Dv] in q's dtype.
        mask: visibility of the T layout tokens, and the backend.
        scale: factor on q.k, above 0, default D ** -0.5.
        window: a query sees keys less than `window` tokens up its own path, and none further up; what of that holds
            within blocks is the mask's rule, see `TreeMask.ruled`.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: [Hq] one extra logit per head that takes probability and gives no value (GPT-OSS).

    Returns:
        [1, Hq, Tq, Dv] in q's dtype.

    Raises:
        InvalidInputError: shapes, dtypes or backends that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_shapes(q, k, v, mask, sinks)
    _check_values(q, k, v, mask, scale, window, softcap, sinks)
    kind = Kind.from_call(q, k, v, mask, window, softcap, sinks)
    backend = mask.cached(("backend", mask.backend, kind), lambda: serving_backend(mask.backend, kind))
    if mask.place.first and backend not in ("cpu", "triton"):
        raise InvalidInputError(
            f"backend={mask.backend!r} means {backend!r} here, and executor='streamed' needs 'cpu' or 'triton'. Use "
            "executor='packed' with a smaller batch."
        )
    mask.backends_used.add(backend)
    if backend == "triton":
        from dta_plugin.attention.triton_backend import triton_attention as run
    elif backend == "cpu":
        from dta_plugin.attention.cpu import cpu_attention as run
    elif backend == "flex":
        from dta_plugin.attention.flex import flex_tree_attention as run
    else:
        from dta_plugin.attention.reference import reference_attention as run
    return run(q, k, v, mask, scale, window, softcap, sinks)


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask, sinks: torch.Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mask of {len(mask)} tokens"
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0] == v.shape[0] == 1
        and 0 < q.shape[2] <= k.shape[2] == v.shape[2] == len(mask) - mask.place.first
        and q.shape[3] == k.shape[3]
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise InvalidInputError(
            f"Got {shapes}. Expected q [1, Hq, Tq, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] with Hq a multiple of Hkv, "
            "T the mask's length and Tq at most T; pack the tree's tokens as one row (see TreeLayout)."
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise InvalidInputError(
            f"Got sinks of shape {tuple(sinks.shape)}. Expected one per query head: ({q.shape[1]},)."
        )


def _check_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidInputError(
            f"Got dtypes {q.dtype}, {k.dtype}, {v.dtype} for q, k, v. Expected one dtype; cast first."
        )
    devices = {x.device for x in (q, k, v, mask.exit, mask.depth, mask.reach, sinks) if x is not None}
    if len(devices) > 1:
        raise InvalidInputError(
            f"Got q, k, v, mask and sinks on {', '.join(sorted(map(str, devices)))}. Expected one device; build the "
            "layout there: TreeLayout.from_tree(tree, device)."
        )
    if not scale > 0:
        raise InvalidInputError(f"Got scale={scale}. Expected None or a factor above 0.")
    if window is not None and window < 1:
        raise InvalidInputError(f"Got window={window}. Expected None or at least 1.")
    if softcap is not None and not softcap > 0:
        raise InvalidInputError(f"Got softcap={softcap}. Expected None or a cap above 0.")
