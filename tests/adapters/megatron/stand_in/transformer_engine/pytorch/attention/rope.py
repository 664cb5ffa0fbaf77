"""Rotary positions, by which Megatron's fused rotary embedding calls Transformer Engine."""

from __future__ import annotations

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """t: [s, b, h, d], or [t, h, d] with cu_seqlens [b + 1]. freqs: [s2, 1, 1, d], by place within a row."""
    assert fused and not interleaved and cp_size == 1 and freqs.shape[1:3] == (1, 1) and freqs.dtype == torch.float32
    if tensor_format == "sbhd":
        return _rotated(t, freqs[: len(t)])
    assert tensor_format == "thd" and cu_seqlens is not None
    lengths = cu_seqlens.diff().tolist()
    assert max(lengths) <= len(freqs)
    return torch.cat([_rotated(row, freqs[: len(row), 0]) for row in t.split(lengths)])


def _rotated(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    head, tail = t[..., : freqs.shape[-1]], t[..., freqs.shape[-1] :]
    first, second = head.chunk(2, dim=-1)
    turned = head * freqs.cos().to(t.dtype) + torch.cat([-second, first], -1) * freqs.sin().to(t.dtype)
    return torch.cat([turned, tail], -1)
