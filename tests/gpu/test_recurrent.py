"""On a CUDA device with flash-linear-attention: its functions along trees, by levels and by paths, against torch's."""

from __future__ import annotations

import pytest
import torch

from dta_plugin.recurrent import fla
from dta_plugin.recurrent.fla import CONVOLUTION, GATED_DELTA_RULE, KDA, serving_kernel
from dta_plugin.recurrent.fla_check import kernel_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(fla._release() is None, reason="needs flash-linear-attention"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "widths"),
    [
        (CONVOLUTION, ()),
        (GATED_DELTA_RULE, (128, 128)),
        (GATED_DELTA_RULE, (96, 192)),
        (GATED_DELTA_RULE, (256, 256)),
        (KDA, (128, 128)),
    ],
)
def test_equals_torch(name: str, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    kernel = serving_kernel(name, device, dtype, *widths)
    assert kernel is not None
    assert kernel_problem(kernel, name, device, dtype, widths) is None
