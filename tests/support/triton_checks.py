"""Checks of the Triton kernels against the float64 reference, with budgets derived from the dense kernel's error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dta_plugin import TreeMask
from dta_plugin.attention.reference import reference_attention
from dta_plugin.attention.trial import FLOOR, Inputs, Options, allowed_error, dense_in_own_dtype, relative_error
from dta_plugin.attention.triton_backend import triton_attention
from tests.support.attention_variants import OPTIONS, mask_of
from tests.support.interpreter import DEVICE
from tests.support.trees import Sequences

VARIANTS = {name: replace(o, head_dim=16, value_dim=16 if o.value_dim == 8 else 24) for name, o in OPTIONS.items()}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(
    sequences: Sequences, options: Options, dtype: torch.dtype = torch.float32, queries: int | None = None
) -> None:
    check_mask(mask_of(sequences, device=DEVICE), options, dtype, queries)


def check_mask(
    mask: TreeMask, options: Options, dtype: torch.dtype = torch.float32, queries: int | None = None
) -> None:
    truth = Inputs(options, len(mask), torch.float64, DEVICE, queries).run(reference_attention, mask)
    inputs = Inputs(options, len(mask), dtype, DEVICE, queries)
    allowed = allowed_error(inputs.run(dense_in_own_dtype, mask), truth)
    assert relative_error(inputs.run(triton_attention, mask), truth, FLOOR) <= allowed
