"""FlexAttention's mask, soft-cap, window, sinks and grouped heads against the reference: forward, eager, on the CPU.

FlexAttention has no CPU backward; the compiled kernel and its gradients need a GPU.
"""

from __future__ import annotations

import pytest
import torch

from dta_plugin.attention.flex import flex_tree_attention
from dta_plugin.attention.reference import reference_attention
from tests.support.attention_variants import OPTIONS, Inputs, mask_of
from tests.support.trees import BLOCK_FORKS, SHAPES

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
NAMES = ("single_token", "forest", "branching_comb", "fork_127", "fork_129_long")


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_forward(option: str) -> None:
    options = OPTIONS[option]
    for name in NAMES:
        mask = mask_of((SHAPES | BLOCK_FORKS)[name])
        x = Inputs(options, len(mask), torch.float32).leaves
        arguments = (x["q"], x["k"], x["v"], mask, options.scale, options.window, options.softcap, x.get("sinks"))
        expected = reference_attention(*arguments)
        torch.testing.assert_close(flex_tree_attention(*arguments), expected, rtol=1e-5, atol=1e-5, msg=name)


@torch.no_grad()
def test_negative_control_siblings_made_visible() -> None:
    options, mask, open_ = OPTIONS["grouped"], mask_of(SHAPES["star_33"]), mask_of(SHAPES["star_33"])
    open_.exit = torch.full_like(mask.exit, len(mask))
    x = Inputs(options, len(mask), torch.float32).leaves
    out = flex_tree_attention(x["q"], x["k"], x["v"], open_, options.scale)
    assert (out - reference_attention(x["q"], x["k"], x["v"], mask, options.scale)).abs().max() > 0.1
