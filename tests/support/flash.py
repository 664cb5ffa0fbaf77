"""Packages of flash attention for a machine without a GPU: the same functions in plain torch, under the same names.

transformers believes that they are installed, so all of its own path around them is the real one: names, imports,
padding taken out and put back, packed sequences, continuous batching.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations import hub_kernels

HUB_KERNEL = "kernels-community/flash-attn2"
# What transformers keeps of the implementation that it has loaded.
_LOADED_ONCE = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)
IMPLEMENTATIONS = ("flash_attention_2", "flash_attention_3", HUB_KERNEL)


@contextmanager
def flash_attention() -> Iterator[list[str]]:
    """Within the context flash attention 2 and 3 and a hub kernel are there. Yields the names of functions called."""
    calls: list[str] = []
    kernel = _package("kernel", calls)
    packages = {name: _package(name, calls) for name in ("flash_attn", "flash_attn_interface")}
    packages["flash_attn.bert_padding"] = padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for interface in (AttentionInterface, AttentionMaskInterface):  # where hub kernels register themselves
            patch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        for name, package in packages.items():
            patch.setitem(sys.modules, name, package)
        for name in _LOADED_ONCE:
            patch.setattr(utils, name, None, raising=False)
        for version in (2, 3):
            patch.setattr(utils, f"is_flash_attn_{version}_available", _yes)
            patch.setattr(PreTrainedModel, f"_flash_attn_{version}_can_dispatch", _yes, raising=False)
            known = getattr(utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}).get(version, {})
            patch.setitem(known, "general_availability_check", _yes)
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", _yes, raising=False)
        patch.setattr(hub_kernels, "is_kernels_available", _yes, raising=False)
        patch.setattr(hub_kernels, "_kernels_available", True, raising=False)
        patch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernel, raising=False)
        yield calls


def _yes(*_: Any, **__: Any) -> bool:
    return True


def _package(name: str, calls: list[str]) -> ModuleType:
    """flash_attn and its like, noting in `calls` what is used."""

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        calls.append(f"{name}.flash_attn_func")
        return _attention(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        calls.append(f"{name}.flash_attn_varlen_func")
        out = torch.zeros_like(q)
        bounds = [(*a, *b) for a, b in zip(_intervals(cu_seqlens_q), _intervals(cu_seqlens_k), strict=True)]
        for q0, q1, k0, k1 in bounds:
            row = _attention(
                q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], softmax_scale, causal, window_size, softcap
            )
            out = torch.cat([out[:q0], row[0], out[q1:]])
        return out

    package = ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    package.__version__ = "2.8.3"  # type: ignore[attr-defined]
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
    return package


def _intervals(bounds: torch.Tensor) -> list[tuple[int, int]]:
    stops = bounds.tolist()
    return list(pairwise(stops))


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """q: [B, Lq, H, D]. k, v: [B, Lk, Hkv, D]; the last query is at the last key. window: keys to the left, right."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    last = k.shape[1] - q.shape[1]
    ahead = torch.arange(k.shape[1])[None, :] - torch.arange(last, k.shape[1])[:, None]
    visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window[0] >= 0:
        visible &= ahead >= -window[0]
    if window[1] >= 0:
        visible &= ahead <= window[1]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
