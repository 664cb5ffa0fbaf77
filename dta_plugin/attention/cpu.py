"""Tree attention on CPUs: a few flash-attention calls per layer, merged by their log-sum-exp.

`cpu_plan` cuts the visible pairs into mask-free rectangles, causal nodes and small masked squares. Each is one call
of torch's CPU flash kernel; plain matrix products where a soft-cap or unequal head dims rule it out, and for grouped
heads before torch 2.9, whose kernel does not know them. Partial results merge by log-sum-exp; the backward pass of
every piece uses the merged output and log-sum-exp, which makes the sum of the pieces' gradients exact
(FlashAttention-2, arXiv 2307.08691, section 3.1).

float16 and bfloat16 are computed in float32 and rounded once at the end: as fast here, more exact, and it avoids the
kernel cache that grows without bound when bfloat16 products take many distinct shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dta_plugin.attention.cpu_plan import Piece, last_queries, plan
from dta_plugin.attention.function import accumulator, attend, unit_stride
from dta_plugin.attention.mask import TreeMask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_GROUPS_HEADS = torch.__version__ >= "2.9"
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_attention(
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
    pieces = mask.cached(("cpu", window), lambda: plan(*mask.host(), window, mask.blocks()))
    if q.shape[2] < len(mask):
        first_query = len(mask) - q.shape[2]
        pieces = mask.cached(("cpu", window, first_query), lambda: last_queries(pieces, first_query))
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (unit_stride(x.to(dtype)) for x in (q, k, v))
    sinks = None if sinks is None else sinks.to(dtype)
    kernels = CpuKernels(pieces, _Scores(scale, softcap))
    with torch.autocast("cpu", enabled=False):
        return attend(q_wide, k_wide, v_wide, sinks, kernels, mask.place).to(q.dtype)


@dataclass(frozen=True, slots=True)
class _Scores:
    """How q.k becomes a score; and the kernel for one piece, forward and backward."""

    scale: float
    softcap: float | None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> output [1, Hq, nq, Dv], log-sum-exp [1, Hq, nq]."""
        if self._flash_serves(q, k, v):
            bias = None if piece.bias is None else piece.bias.to(q.dtype)[None, None]
            return _flash(q, k, v, 0.0, piece.causal, attn_mask=bias, scale=self.scale)
        scores, _ = self._scores(q, k, piece)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        out = torch.exp(scores - lse) @ v[0].unsqueeze(1)
        return out.flatten(0, 1)[None], lse.flatten(0, 1)[None, ..., 0]

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        piece: Piece,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v from this piece, given the merged `out` and `lse` of its queries."""
        if self._flash_serves(q, k, v):
            bias = None if piece.bias is None else piece.bias.to(q.dtype)[None, None]
            return _flash_backward(grad, q, k, v, out, lse, 0.0, piece.causal, attn_mask=bias, scale=self.scale)
        heads = (k.shape[1], -1)
        scores, slope = self._scores(q, k, piece)
        weights = torch.exp(scores - lse[0].unflatten(0, heads)[..., None])
        grad_out = grad[0].unflatten(0, heads)
        delta = (grad_out * out[0].unflatten(0, heads)).sum(dim=-1, keepdim=True)
        grad_scores = weights * (grad_out @ v[0].unsqueeze(1).mT - delta) * (self.scale * slope)
        grad_q = grad_scores @ k[0].unsqueeze(1)
        grad_k = (grad_scores.mT @ q[0].unflatten(0, heads)).sum(dim=1)
        grad_v = (weights.mT @ grad_out).sum(dim=1)
        return grad_q.flatten(0, 1)[None], grad_k[None], grad_v[None]

    def _flash_serves(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        groups_heads = q.shape[1] != k.shape[1]
        return self.softcap is None and q.shape[-1] == v.shape[-1] and (_FLASH_GROUPS_HEADS or not groups_heads)

    def _scores(self, q: torch.Tensor, k: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scores [Hkv, G, nq, nk] and d(score)/d(scale * q.k)."""
        scores = q[0].unflatten(0, (k.shape[1], -1)) @ k[0].unsqueeze(1).mT * self.scale
        slope: torch.Tensor | float = 1.0
        if self.softcap is not None:
            squashed = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * squashed, 1 - squashed**2
        if piece.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        elif piece.bias is not None:
            scores = scores + piece.bias.to(scores.dtype)
        return scores, slope


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """Forward and backward of one call over the pieces of a plan; see `Kernels` in attention/function.py."""

    pieces: list[Piece]
    scores: _Scores

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Token-major memory [1, T, H, D], which is what the model's next operation reads.
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        lse = q.new_empty(1, q.shape[2], q.shape[1]).transpose(1, 2)
        for piece in self.pieces:
            part, part_lse = self.scores.forward(q[:, :, piece.q], _take(k, piece), _take(v, piece), piece)
            out_q, lse_q = out[:, :, piece.q], lse[:, :, piece.q]
            if piece.first:
                out_q.copy_(part)
                lse_q.copy_(part_lse)
            else:
                out_q.lerp_(part, torch.sigmoid(part_lse - lse_q)[..., None])
                torch.logaddexp(lse_q, part_lse, out=lse_q)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks[None, :, None])
            out.mul_(torch.exp(lse - total)[..., None])
            lse = total
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
        grad_q = accumulator(q)
        for piece in self.pieces:
            part_q, part_k, part_v = self.scores.backward(
                grad[:, :, piece.q],
                q[:, :, piece.q],
                _take(k, piece),
                _take(v, piece),
                out[:, :, piece.q],
                lse[:, :, piece.q],
                piece,
            )
            grad_q[:, :, piece.q] += part_q
            _add(grad_k, part_k, piece)
            _add(grad_v, part_v, piece)
        return grad_q


def _take(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    return x[:, :, piece.k] if isinstance(piece.k, slice) else x.index_select(2, piece.k)


def _add(total: torch.Tensor, part: torch.Tensor, piece: Piece) -> None:
    if isinstance(piece.k, slice):
        total[:, :, piece.k] += part
    else:
        total.index_add_(2, piece.k, part)
