"""The attention ops that the benchmark times, each on random q, k, v of its own and a random gradient.

* `tree`: `dta_plugin.tree_attention` on the tree's tokens. `flex`: the same op through torch's FlexAttention.
* `varlen flash`: FlashAttention on all sequences packed end to end, every shared prefix repeated.
* `dense flash`: FlashAttention through SDPA on batches of whole sequences. Sequences of equal length are one batch; if
  the device has no memory for it, smaller batches one after the other.

Both `flash` contenders are the kernel that torch itself ships, FlashAttention-2; FlashAttention-3 is faster on Hopper.

All inputs have the strides in which transformers hands them over: [B, L, H, D] in memory, seen as [B, H, L, D].
"""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.harness import mark, milliseconds, synchronize
from dta_plugin import PrefixTree
from dta_plugin.attention import TreeMask, tree_attention
from dta_plugin.tree.layout import TreeLayout

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLUSHED_BYTES = 256 << 20  # several times the largest L2 cache


@dataclass(frozen=True, slots=True)
class Setting:
    """Head counts, head dimension, and where and in what dtype everything runs."""

    query_heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    @property
    def tree_backend(self) -> str:
        return "cpu" if self.device.type == "cpu" else "triton"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a contender. peak_bytes: the most memory it held beyond its inputs; None on CPUs."""

    forward_ms: float
    backward_ms: float
    peak_bytes: int | None

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of an attention op. q: [B, Hq, L, D]; k, v: [B, Hkv, L, D]; all leaves. grad: [B, Hq, L, D]."""

    attend: Attend
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor

    def run(self) -> tuple[torch.cuda.Event | float, ...]:
        """Marks before the forward pass, between the passes, and after the backward pass."""
        start = mark(self.q.device)
        out = self.attend(self.q, self.k, self.v)
        middle = mark(self.q.device)
        torch.autograd.grad(out, (self.q, self.k, self.v), self.grad)
        return start, middle, mark(self.q.device)


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """calls: run one after the other; their inputs are views of `buffers`. pairs: query-key pairs the op must see."""

    calls: list[Call]
    buffers: list[torch.Tensor]
    pairs: int
    note: str = ""

    def run(self) -> Sample:
        """Forward and backward of every call, on fresh random inputs and a cold cache."""
        device = self.buffers[0].device
        for buffer in self.buffers:
            buffer.normal_()
        before = 0
        if device.type == "cuda":
            _flushed(device).zero_()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        marks = [call.run() for call in self.calls]
        synchronize(device)
        return Sample(
            sum(milliseconds(start, middle) for start, middle, _ in marks),
            sum(milliseconds(middle, stop) for _, middle, stop in marks),
            torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None,
        )


def candidates(tree: PrefixTree, setting: Setting) -> dict[str, Iterable[Callable[[], Contender]]]:
    """Per contender the ways to build it, best first; see `warmed_up`."""
    lengths = np.diff(tree.offsets).tolist()
    return {
        "tree": [partial(_on_tree, tree, setting, setting.tree_backend)],
        "flex": [partial(_on_tree, tree, setting, "flex")],
        "varlen flash": [partial(_packed, lengths, setting)],
        "dense flash": _batched_variants(lengths, setting),
    }


def warmed_up(variants: Iterable[Callable[[], Contender]]) -> tuple[Contender, Sample] | str:
    """The first variant that fits in memory, run twice, with the second run's sample; or why there is none."""
    for build in variants:
        contender = None
        try:
            contender = build()
            contender.run()
            return contender, contender.run()
        except torch.OutOfMemoryError:
            pass
        except Exception as error:
            return reason(error)
        del contender
        release()
    return "OOM"


def release() -> None:
    """Hands unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """The first sentence of an error, short enough for a table."""
    sentence = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return f"not available: {sentence[:100]}"


def tree_attend(tree: PrefixTree, device: torch.device, backend: str) -> Attend:
    mask = TreeMask.from_layout(TreeLayout.from_tree(tree, device), backend)
    return lambda q, k, v: tree_attention(q, k, v, mask)


def varlen_attend(lengths: Sequence[int], device: torch.device) -> Attend:
    """torch's own FlashAttention on sequences packed end to end: torch 2.10 and later, CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    # Causality is a flag in torch 2.10 and a window since. GQA always works; since 2.12 it must be asked for.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        packed = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        return varlen_attn(*packed, bounds, bounds, longest, longest, **options).transpose(0, 1).unsqueeze(0)

    return attend


def dense_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention and nothing else on GPUs, where torch says so if it cannot serve; SDPA's choice on CPUs."""
    backends = [SDPBackend.FLASH_ATTENTION] + ([] if q.is_cuda else [SDPBackend.MATH])
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _on_tree(tree: PrefixTree, setting: Setting, backend: str) -> Contender:
    attend = tree_attend(tree, setting.device, backend)
    return Contender(*_calls([(1, tree.tree_tokens)], attend, setting), tree.visible_pairs())


def _packed(lengths: list[int], setting: Setting) -> Contender:
    attend = varlen_attend(lengths, setting.device)
    return Contender(*_calls([(1, sum(lengths))], attend, setting), _causal_pairs(lengths))


def _batched(lengths: list[int], setting: Setting, rows: int) -> Contender:
    """rows: most sequences in one call."""
    counts = Counter(lengths)
    shapes = [(min(rows, n - done), length) for length, n in sorted(counts.items()) for done in range(0, n, rows)]
    notes = [f"{len(shapes)} calls"] if len(shapes) > 1 else []
    if rows < max(counts.values()):
        notes.append(f"OOM as one batch of {max(counts.values())}, so at most {rows} rows per call")
    return Contender(*_calls(shapes, dense_attend, setting), _causal_pairs(lengths), "; ".join(notes))


def _batched_variants(lengths: list[int], setting: Setting) -> Iterator[Callable[[], Contender]]:
    rows = max(Counter(lengths).values())
    yield partial(_batched, lengths, setting, rows)
    while rows > 1:
        rows = (rows + 1) // 2
        yield partial(_batched, lengths, setting, rows)


def _calls(shapes: list[tuple[int, int]], attend: Attend, setting: Setting) -> tuple[list[Call], list[torch.Tensor]]:
    """One call per (rows, length), and the four buffers that all of them share: q, k, v and the gradient."""
    query, kv, dim = setting.query_heads, setting.kv_heads, setting.head_dim
    most = max(rows * length for rows, length in shapes)
    buffers = [
        torch.empty(most * heads * dim, device=setting.device, dtype=setting.dtype) for heads in (query, kv, kv, query)
    ]

    def view(buffer: torch.Tensor, rows: int, length: int) -> torch.Tensor:
        heads = buffer.numel() // (most * dim)
        return buffer[: rows * length * heads * dim].view(rows, length, heads, dim).transpose(1, 2)

    calls = []
    for rows, length in shapes:
        *qkv, grad = (view(buffer, rows, length) for buffer in buffers)
        calls.append(Call(attend, *(x.detach().requires_grad_() for x in qkv), grad))
    return calls, buffers


def _causal_pairs(lengths: Iterable[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


@cache
def _flushed(device: torch.device) -> torch.Tensor:
    """Memory that pushes everything else out of the cache when it is written."""
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
