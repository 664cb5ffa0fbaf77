"""Triton's CPU interpreter, made to round as a GPU does. `tests/conftest.py` switches it on where there is no GPU.

The interpreter of Triton 3.4 to 3.9 multiplies the raw bits of bfloat16 operands and truncates when it casts to
bfloat16; a GPU multiplies exactly, accumulates in float32 and rounds to nearest even. The kernels do all their
arithmetic but `tl.dot` in float32, so two patches are enough. TF32 is not emulated: the kernels run with exact float32
products here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def _dot(builder: Any, a: Any, b: Any, accumulator: Any, *options: object) -> Any:
    return _interpreter_dot(builder, _widened(a), _widened(b), accumulator, *options)


def _cast(builder: Any, source: Any, dtype: Any, *options: object) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        bits = source.data.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), quiet_nan, rounded), tl.bfloat16)
    return _interpreter_cast[bool(options)](builder, source, dtype, *options)


def _widened(operand: Any) -> Any:
    """bfloat16, which the interpreter keeps as raw bits, as float32."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


_builder = interpreter.InterpreterBuilder
_interpreter_dot = _builder.create_dot
_interpreter_cast = {False: _builder.cast_impl, True: _builder.create_fp_to_fp}
_builder.create_dot = _dot
_builder.cast_impl = _builder.create_fp_to_fp = _cast


def round_accumulators(patch: pytest.MonkeyPatch) -> None:
    """A fault: products are added to what was there before in bfloat16."""

    def rounded(builder: Any, a: Any, b: Any, accumulator: Any, *options: object) -> Any:
        total = _dot(builder, a, b, accumulator, *options)
        if not accumulator.data.any():
            return total
        return _widened(_cast(builder, total, tl.bfloat16))

    patch.setattr(_builder, "create_dot", rounded)
