"""Which precision torch lets matrix products of float32 have. Needs no Triton."""

from __future__ import annotations

import torch


def allows_tf32() -> bool:
    """Whether CUDA may round the factors of float32 products to TF32, which has the mantissa of float16."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer, where the older switches may raise
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
