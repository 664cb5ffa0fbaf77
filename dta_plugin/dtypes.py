"""Which dtype something is computed in: what autocast makes of it, and what sums and softmaxes are taken in."""

from __future__ import annotations

import torch


def compute_dtype(device_type: str, own: torch.dtype) -> torch.dtype:
    """What matrix products of `own` run in on devices of this type: autocast's dtype where that is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else own


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
