"""Causal attention over packed rows, [t, heads, d], or padded ones, [s, b, heads, d]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and not attention_dropout and attn_mask_type == "causal"
        self.window_size, self.softmax_scale = window_size, softmax_scale

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        """-> [t, heads * d] or [s, b, heads * d]. A padding mask is not read, as causal attention does not need it."""
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return self._attend(*(x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))).permute(
                1, 0, 2
            )
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and cu_seqlens_q is not None
        assert max_seqlen_q == max_seqlen_kv
        ends = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
        rows = zip(*(x.split(ends.diff().tolist()) for x in (query_layer, key_layer, value_layer)), strict=True)
        return torch.cat([self._attend(*(x.transpose(0, 1)[None] for x in row))[0] for row in rows])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, heads, s, d], each -> [b, s, heads * d]"""
        index = torch.arange(query.shape[-2])
        ago = index[:, None] - index
        visible = ago >= 0 if self.window_size is None else (ago >= 0) & (ago <= self.window_size[0])
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=self.softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)
