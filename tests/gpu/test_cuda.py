"""On a CUDA device: FlexAttention, the LM head and whole models against the dense oracle. `make gpu` runs them."""

from __future__ import annotations

import pytest
import torch

import dta_plugin
from dta_plugin import TreeConfig, TreeLayout, TreeMask, tree_attention
from dta_plugin.verify import compare
from tests.support.models import tiny_model
from tests.support.trees import SHAPES, star

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_flex_attention_matches_the_reference(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    tree = dta_plugin.PrefixTree.from_sequences(star(12, prefix=150, branch=40))
    layout = TreeLayout.from_tree(tree, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        shape = (1, heads, tree.tree_tokens, 64)
        return torch.randn(shape, generator=generator, device="cuda").requires_grad_()

    inputs = [random(4), random(2), random(2)]
    sinks = torch.randn(4, generator=generator, device="cuda").requires_grad_() if with_sinks else None
    gradients, outputs = [], []
    for backend in ("flex", "reference"):
        mask = TreeMask.from_layout(layout, backend)
        out = tree_attention(*inputs, mask, window=window, softcap=softcap, sinks=sinks)
        needed = inputs if sinks is None else [*inputs, sinks]
        gradients.append(torch.autograd.grad(out.square().sum(), needed))
        outputs.append(out)
    for actual, expected in [(outputs[0], outputs[1]), *zip(*gradients, strict=True)]:
        assert (actual - expected).norm() <= 2e-3 * expected.norm()  # TF32 products


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt_oss"])
def test_models_match_dense(family: str) -> None:
    model = tiny_model(family).to("cuda")
    for sequences in SHAPES.values():
        if sum(map(len, sequences)) > 3000:
            continue
        difference = compare(model, sequences, config=TreeConfig())
        assert difference.logprob_max < 5e-3 and difference.worst_gradient[1] < 2e-2
