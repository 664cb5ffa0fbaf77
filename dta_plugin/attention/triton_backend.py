"""Tree attention on NVIDIA GPUs: launches the kernels of `triton_fwd` and `triton_bwd`.

Exact, deterministic and without atomics; the mask is O(T) metadata plus the tile lists of `attention/tiles.py`.
Nothing is compiled per length: tile sizes come from a table per GPU generation, and lengths are run-time arguments.

float32 products follow torch's own switch, `torch.backends.cuda.matmul`: exact unless TF32 is allowed there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from dta_plugin.attention.function import attend, unit_stride
from dta_plugin.attention.mask import TreeMask
from dta_plugin.attention.precision import allows_tf32
from dta_plugin.attention.tiles import KeyWork, Visits, key_work, on_device, tile_pairs, visits
from dta_plugin.attention.triton_bwd import delta_kernel, key_gradient_kernel, query_gradient_kernel, reduce_kernel
from dta_plugin.attention.triton_fwd import forward_kernel
from dta_plugin.attention.triton_parts import WIDEST, Matrix, block_of
from dta_plugin.attention.triton_table import Launch, Launches, launches

_DELTA_TILE = 32


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in `tree_attention`."""
    return attend(q, k, v, sinks, TritonKernels(mask, scale, window, softcap), mask.place)


@dataclass(frozen=True, slots=True)
class TritonKernels:
    """Forward and backward of one call; see `Kernels` in attention/function.py."""

    mask: TreeMask
    scale: float
    window: int | None
    softcap: float | None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        sinks = None if sinks is None else sinks.contiguous()
        out = _token_major(q, v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch = self._launches(q, v).forward
        visits = self._by_query(launch, q.shape[2])
        with _on(q.device):
            forward_kernel[(q.shape[1], len(visits.order), _shares(v))](
                *_matrices(q, k, v, out), lse, sinks, **self._arguments(launch, q, k), **_by_row(visits)
            )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_k: torch.Tensor,
        grad_v: torch.Tensor,
    ) -> torch.Tensor:
        grad, q, k, v = (unit_stride(x) for x in (grad, q, k, v))
        delta = torch.empty_like(lse)
        with _on(q.device):
            delta_kernel[(q.shape[1], _tiles(q.shape[2], _DELTA_TILE))](
                *_matrices(out, grad), delta, q.shape[2], TILE=_DELTA_TILE
            )
            for launch, keys, values in self._launches(q, v).key_passes():
                self._add_key_gradients(launch, grad, q, k, v, lse, delta, grad_k, grad_v, keys=keys, values=values)
            return self._query_gradient(grad, q, k, v, lse, delta)

    def _query_gradient(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor:
        grad_q = _token_major(q, q.shape[3])
        launch = self._launches(q, v).query_gradient
        visits = self._by_query(launch, q.shape[2])
        tiles = _described(k, v, launch.key_tile) if launch.described and _can_describe(k, v) else (None, None)
        query_gradient_kernel[(q.shape[1], len(visits.order), _shares(q))](
            *_matrices(q, k, v, grad, grad_q), *tiles, lse, delta, **self._arguments(launch, q, k), **_by_row(visits)
        )
        return grad_q

    def _add_key_gradients(
        self,
        launch: Launch,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_k: torch.Tensor,
        grad_v: torch.Tensor,
        *,
        keys: bool,
        values: bool,
    ) -> None:
        """Add the gradients of the keys, of the values, or of both."""
        heads = k.shape[1]
        visits, work = self._by_key(launch, q, k)
        part_k, part_v = (
            x.new_empty(1, work.slots * heads * is_wanted, launch.key_tile, x.shape[3], dtype=torch.float32)
            for x, is_wanted in ((k, keys), (v, values))
        )
        key_gradient_kernel[(heads, len(work.tile), _shares(k if keys else v))](
            *_matrices(q, k, v, grad, grad_k, grad_v), Matrix.from_tiles(part_k), Matrix.from_tiles(part_v), lse, delta,
            work.tile, work.begin, work.end, work.slot, visits.start, visits.masked, visits.column,
            KEYS=keys, VALUES=values, **self._arguments(launch, q, k),
        )  # fmt: skip
        if work.slots:
            for part, total in ((part_k, grad_k),) * keys + ((part_v, grad_v),) * values:
                reduce_kernel[(heads, len(work.split_tile), _shares(total))](
                    Matrix.from_tiles(part), Matrix.from_tensor(total), work.split_tile, work.split_start, k.shape[2],
                    KEY_TILE=launch.key_tile, num_warps=8,
                )  # fmt: skip

    def _launches(self, q: torch.Tensor, v: torch.Tensor) -> Launches:
        width = max(q.shape[3], v.shape[3])
        found = launches(_arch(q.device), q.element_size(), width, self.softcap is not None)
        assert found is not None, "resolve_backend sends such inputs elsewhere"
        return found

    def _tree(self) -> tuple[torch.Tensor, torch.Tensor]:
        """exit and depth, int32 [T]."""
        return self.mask.cached("triton", lambda: (self.mask.exit.int(), self.mask.depth.int()))

    def _limits(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Last and Near of the kernels, int32 [T]: of blocks that attend both ways."""
        reach = self.mask.reach
        if reach is None:
            return None, None
        last = self.mask.cached("triton last", lambda: (reach - 1).int())
        if self.window is None or self.mask.rule != "whole":
            return last, None
        return last, self.mask.cached("triton near", lambda: torch.searchsorted(reach, reach).int())

    def _by_query(self, launch: Launch, queries: int) -> Visits:
        """The key tiles that each query tile visits."""
        tiles = (launch.query_tile, launch.key_tile)

        def build() -> Visits:
            pairs = tile_pairs(*self.mask.host(), self.window, *tiles, len(self.mask) - queries, self.mask.blocks())
            found = visits(pairs.query, pairs.key, pairs.full, _tiles(queries, launch.query_tile))
            return on_device(self.mask.exit.device, found)[0]

        return self.mask.cached(("triton by query", self.window, queries, *tiles), build)

    def _by_key(self, launch: Launch, q: torch.Tensor, k: torch.Tensor) -> tuple[Visits, KeyWork]:
        """The query tiles that each key tile visits, and how they are shared among programs."""
        tiles = (launch.query_tile, launch.key_tile)
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]

        def build() -> tuple[Visits, KeyWork]:
            pairs = tile_pairs(*self.mask.host(), self.window, *tiles, k.shape[2] - q.shape[2], self.mask.blocks())
            found = visits(pairs.key, pairs.query, pairs.full, _tiles(k.shape[2], launch.key_tile))
            return on_device(q.device, found, key_work(found, groups, heads, _processors(q.device)))

        return self.mask.cached(("triton by key", self.window, q.shape[2], heads, groups, *tiles), build)

    def _arguments(self, launch: Launch, q: torch.Tensor, k: torch.Tensor) -> dict[str, object]:
        """What all kernels that compute scores take."""
        exit, depth = self._tree()
        last, near = self._limits()
        return {
            "Exit": exit,
            "Depth": depth,
            "Last": last,
            "Near": near,
            "queries": q.shape[2],
            "keys": k.shape[2],
            "first_query": k.shape[2] - q.shape[2],
            "scale": float(self.scale),
            "softcap": None if self.softcap is None else float(self.softcap),
            "window": self.window,
            "GROUPS": q.shape[1] // k.shape[1],
            "QUERY_TILE": launch.query_tile,
            "KEY_TILE": launch.key_tile,
            "PRECISION": "tf32" if q.dtype == torch.float32 and allows_tf32() else "ieee",
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arch(device: torch.device) -> int:
    """10 * compute capability. On a CPU, where only the interpreter runs the kernels, that of an H200."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _processors(device: torch.device) -> int:
    """Multiprocessors; those of an H200 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tiles(rows: int, tile: int) -> int:
    return -(-rows // tile)


def _shares(x: torch.Tensor) -> int:
    """Programs among which the columns of an output like x are shared out."""
    return max(1, block_of(x.shape[3]) // WIDEST)


def _can_describe(*inputs: torch.Tensor) -> bool:
    """Whether the hardware's tensor descriptors can address these: starts and strides are multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and all(x.stride(i) * x.element_size() % 16 == 0 for i in (1, 2)) for x in inputs)


def _described(k: torch.Tensor, v: torch.Tensor, key_tile: int) -> tuple[TensorDescriptor, ...]:
    """k and v as descriptors [H, T, D] that are read in tiles of `key_tile` keys."""
    return tuple(TensorDescriptor.from_tensor(x[0], [1, key_tile, block_of(x.shape[3])]) for x in (k, v))


def _token_major(x: torch.Tensor, width: int) -> torch.Tensor:
    """Empty [1, H, T, width] in memory [1, T, H, width], which is what the model's next operation reads."""
    return x.new_empty(1, x.shape[2], x.shape[1], width).transpose(1, 2)


def _matrices(*tensors: torch.Tensor) -> tuple[Matrix, ...]:
    return tuple(map(Matrix.from_tensor, tensors))


def _by_row(visits: Visits) -> dict[str, torch.Tensor]:
    return {"Order": visits.order, "Start": visits.start, "Masked": visits.masked, "Column": visits.column}
