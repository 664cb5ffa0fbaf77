"""On a CUDA device: FlexAttention, whole models against the dense oracle, long rows through the launch table.

`make gpu` runs them, and tests/attention, whose Triton tests then run on the device.
"""

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
    model = tiny_model(family, head_dim=32).to("cuda")
    for sequences in SHAPES.values():
        if sum(map(len, sequences)) > 3000:
            continue
        for config in (TreeConfig(), TreeConfig(executor="streamed", max_tree_tokens_per_chunk=64)):
            difference = compare(model, sequences, config=config)
            assert difference.logprobs.most < 5e-3 and difference.worst_gradient[1] < 2e-2


def test_auto_means_triton() -> None:
    report = dta_plugin.sequence_logprobs(tiny_model("qwen3", head_dim=64).to("cuda"), star(4)).report
    assert report.backend == "triton"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_rows_are_exact_and_bitwise_repeatable(head_dim: int) -> None:
    """17,408 tokens through the tiles of the launch table, the prompt's keys split over several programs."""
    layout = TreeLayout.from_tree(dta_plugin.PrefixTree.from_sequences(star(16, 9216, 512)), "cuda")
    mask = TreeMask.from_layout(layout, "triton")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, weight = (
        torch.randn(1, heads, len(mask), head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 1, 1, 4)
    )

    def run(dtype: torch.dtype, backend: str, head: int | None = None) -> tuple[torch.Tensor, ...]:
        mask.backend = backend
        inputs = [x.to(dtype).requires_grad_() for x in (q if head is None else q[:, head : head + 1], k, v)]
        out = tree_attention(*inputs, mask)
        wanted = weight if head is None else weight[:, head : head + 1]
        return (out, *torch.autograd.grad((out * wanted).sum(), inputs))

    first, second = run(torch.bfloat16, "triton"), run(torch.bfloat16, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    truth = [run(torch.float32, "reference", head) for head in range(4)]
    expected = [torch.cat([t[i] for t in truth], dim=1) for i in (0, 1)]
    expected += [torch.stack([t[i] for t in truth]).sum(dim=0) for i in (2, 3)]
    for actual, wanted in zip(first, expected, strict=True):
        assert (actual.float() - wanted).norm() <= 1e-2 * wanted.norm()


def test_loads_are_measured_without_synchronising() -> None:
    """CUDA events: nothing waits for the device until the seconds are read."""
    load_balance = pytest.importorskip("dta_plugin.adapters.trl.load_balance")
    loads = load_balance.LoadBalance()
    loads._plan, loads._device = [(1.0, 0.0)], torch.device("cuda")
    weight = torch.randn(4096, 4096, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loads.hands_out(0)
        logprobs = weight @ weight
        loads.scored(logprobs)
        logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (step,) = loads._current
    assert len(step.spans) == 2 and 0 < step.seconds < 60
