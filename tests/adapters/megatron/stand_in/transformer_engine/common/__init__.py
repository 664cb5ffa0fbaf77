"""Megatron extends a recipe of fp8 as it is imported."""

from __future__ import annotations

from transformer_engine.common import recipe

__all__ = ["recipe"]
