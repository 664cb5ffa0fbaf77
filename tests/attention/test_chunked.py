"""Attention within ranges of positions, against a mask that is written out and against Llama 4."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

import dta_plugin
from dta_plugin import InvalidInputError, PrefixTree, TreeConfig, TreeLayout, TreeMask
from dta_plugin.attention import chunked
from dta_plugin.attention.chunked import chunked_tree_attention
from dta_plugin.models import attention_registry
from tests.support.oracle import dense, difference
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import through_tree
from tests.support.trees import Sequences, sequence_batches

has_llama4 = pytest.mark.skipif(Version(version("transformers")) < Version("5.5"), reason="other configs before")


@settings(max_examples=30, deadline=None)
@given(sequence_batches(), st.integers(1, 7), st.sampled_from(["cpu", "reference"]))
def test_queries_see_their_own_range(sequences: Sequences, chunk: int, backend: str) -> None:
    layout = TreeLayout.from_tree(PrefixTree.from_sequences(sequences))
    mask = TreeMask.from_layout(layout, backend)
    generator = torch.Generator().manual_seed(len(mask))
    q, k, v = (
        torch.randn(1, heads, len(mask), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    out = chunked_tree_attention(q, k, v, mask, chunk)
    of_range = layout.depth // chunk
    visible = mask.visible() & (of_range[:, None] == of_range[None])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    assert torch.allclose(out, expected, atol=1e-12)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found, right = (torch.autograd.grad((x * weight).sum(), (q, k, v), retain_graph=True) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, right, strict=True))


def llama4(chunk: int) -> torch.nn.Module:
    config = config_of("llama4_text")
    config.attention_chunk_size = chunk
    return random_causal_lm(config)


@has_llama4
@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_llama4(chunk: int) -> None:
    assert difference(through_tree(llama4(chunk), forest()), dense(llama4(chunk), forest())).worst <= 1e-5


@has_llama4
def test_streamed_within_the_first_range() -> None:
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
    found = through_tree(llama4(64), forest(), config=config, executor="streamed")
    assert difference(found, dense(llama4(64), forest())).worst <= 1e-5
    with pytest.raises(InvalidInputError, match="attention in ranges of 5 positions, and a row of 18 tokens"):
        dta_plugin.sequence_logprobs(llama4(5), forest(), config)
    auto = TreeConfig(max_tree_tokens_per_chunk=7)
    assert "ranges of 5" in dta_plugin.sequence_logprobs(llama4(5), forest(), auto).report.reason


@has_llama4
@pytest.mark.parametrize("budget", [None, 7])
def test_queries_are_scaled_by_their_depth(budget: int | None) -> None:
    """Llama 4 counts positions along the row, in the layers without rotary ones."""

    def tuned() -> torch.nn.Module:
        config = config_of("llama4_text")
        config.update({"attention_chunk_size": 64, "attn_temperature_tuning": True, "floor_scale": 4})
        return random_causal_lm(config)

    executor = "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    found = through_tree(tuned(), forest(), config=config, executor=executor)
    assert difference(found, dense(tuned(), forest())).worst <= 1e-5


@has_llama4
@pytest.mark.usefixtures("unprobed")
def test_ranges_that_are_passed_over_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(q, k, v, mask, chunk, **options):
        return chunked.tree_attention(q, k, v, mask, **options)

    expected = dense(llama4(5), forest())
    monkeypatch.setattr(attention_registry, "chunked_tree_attention", whole)
    assert difference(through_tree(llama4(5), forest()), expected).logprobs > 1e-2
