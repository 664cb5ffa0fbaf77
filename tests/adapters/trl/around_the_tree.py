"""Models with a layer that cannot run as a tree, which only a call shows; on padding to the right they are exact."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb


def _around(self: Any, hidden_states: torch.Tensor, position_embeddings: Any, *_: Any, **__: Any) -> Any:
    """Qwen3's attention, computed here: nothing is looked up."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def _with_a_mask(
    self: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
) -> Any:
    """Qwen3's attention with a mask of its own, which a tree has no place for."""
    length = hidden_states.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=hidden_states.dtype).triu(1)[None, None]
    return type(self).forward(self, hidden_states, position_embeddings, mask, **kwargs)


FORWARDS: dict[str, Callable[..., Any]] = {"around the tree": _around, "a mask of its own": _with_a_mask}


def with_such_a_layer(model: nn.Module, kind: str) -> nn.Module:
    """The model, its last layer's attention of one of the kinds of `FORWARDS`."""
    *_, attention = (module for module in model.modules() if hasattr(module, "q_proj"))
    attention.forward = types.MethodType(FORWARDS[kind], attention)
    return model
