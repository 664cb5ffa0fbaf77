"""float64 models without transformers' float32 islands: what asks for float32 gets float64.

Modeling files cast to float32 in norms, routers, softmaxes and scans, which leaves float64 models with a floor of 1e-7
and, where gradients cancel, of 1e-5. The casts themselves are exchanged, so that no family has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional


@contextmanager
def widened() -> Iterator[None]:
    """Within the context, casts of tensors to float32 and softmaxes in it are to and in float64."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch.Tensor, "to"), (torch.Tensor, "type"), (functional, "softmax")):
            patch.setattr(owner, name, _wide(getattr(owner, name)))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_wide_dtype, args), **{name: _wide_dtype(value) for name, value in kwargs.items()})

    return call


def _wide_dtype(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x
