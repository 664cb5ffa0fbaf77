"""Blocks that attend both ways: the reference against dense sequences, every CPU plan and FlexAttention against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import PrefixTree, TreeMask, UnsupportedError, tree_attention
from dta_plugin.attention import cpu, cpu_plan
from dta_plugin.attention.blocks import BlockRule, cut_after, cut_before
from dta_plugin.attention.chunked import chunked_tree_attention
from dta_plugin.attention.cpu import cpu_attention
from dta_plugin.attention.flex import flex_tree_attention
from dta_plugin.attention.reference import reference_attention
from tests.support.attention_variants import OPTIONS, Inputs, Options, mask_of, relative_error
from tests.support.blocks import RULES, block_mask, dense_visible, mask_of_tree, with_blocks, with_random_blocks
from tests.support.trees import SHAPES, Sequences, branching_comb, forest, fork_at, run, sequence_batches, star

UNIT, BLOCK = 4, 8
PLANS: dict[str, Callable[..., list[cpu_plan.Piece]]] = {
    "plan": cpu_plan.plan,
    "blocks": cpu_plan.blocks,
    "cascade": lambda exit, depth, window, both_ways: cpu_plan.cascade(exit, depth, both_ways),
}
rules = pytest.mark.parametrize("rule", RULES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and blocks of queries so small that little trees have many of both."""
    monkeypatch.setattr(cpu_plan, "_UNIT", UNIT)
    monkeypatch.setattr(cpu_plan, "_BLOCK", BLOCK)


def plans_for(window: int | None) -> list[str]:
    """The cascade knows no window."""
    return [name for name in PLANS if window is None or name != "cascade"]


def error_to_dense(tree: PrefixTree, rule: BlockRule, dense_rule: BlockRule, window: int | None) -> float:
    """Of the reference's output and gradients, to those of torch's attention on each sequence alone."""
    mask = mask_of_tree(tree, rule, "reference")
    generator = torch.Generator().manual_seed(len(mask))
    q, k, v, weight = (
        torch.randn(1, heads, len(mask), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2, 4)
    )
    out = tree_attention(q, k, v, mask, window=window)
    found, expected, error = out.new_zeros(()), out.new_zeros(()), 0.0
    for sequence in range(tree.num_sequences):
        path = torch.from_numpy(tree.path(sequence))
        visible = dense_visible(tree, sequence, dense_rule, window)
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, path], k[:, :, path], v[:, :, path], visible, enable_gqa=True
        )
        error = max(error, (dense - out[:, :, path]).abs().max().item())
        found = found + (out[:, :, path] * weight[:, :, path].detach()).sum()
        expected = expected + (dense * weight[:, :, path].detach()).sum()
    grads = zip(*(torch.autograd.grad(x, (q, k, v)) for x in (found, expected)), strict=True)
    return max(error, *((a - b).abs().max().item() for a, b in grads))


@given(sequence_batches(max_length=20), st.integers(0, 10**6), st.sampled_from([None, 1, 3, 7, 100]))
def test_the_reference_is_the_dense_mask_of_each_sequence(sequences: Sequences, seed: int, window: int | None) -> None:
    tree = with_random_blocks(PrefixTree.from_sequences(sequences), seed)
    for rule in (*RULES, "causal"):
        assert error_to_dense(tree, rule, rule, window) < 1e-11


def test_negative_control_another_rule() -> None:
    tree = with_random_blocks(PrefixTree.from_sequences(star(6, prefix=20, branch=9)), seed=1)
    for rule in RULES:
        assert error_to_dense(tree, "causal", rule, None) > 0.1
        assert error_to_dense(tree, rule, rule, 3) < 1e-11
    assert error_to_dense(tree, "windowed", "whole", 3) > 0.1
    assert error_to_dense(tree, "whole", "windowed", 3) > 0.1


def error_of(mask: TreeMask, options: Options, queries: int | None = None) -> float:
    """Of the CPU path to the reference."""
    inputs = Inputs(options, len(mask), torch.float64, queries=queries)
    return relative_error(inputs.run(cpu_attention, mask), inputs.run(reference_attention, mask))


@rules
@pytest.mark.parametrize("option", OPTIONS)
def test_every_shape(monkeypatch: pytest.MonkeyPatch, small_blocks: None, option: str, rule: BlockRule) -> None:
    for name in plans_for(OPTIONS[option].window):
        monkeypatch.setattr(cpu, "plan", PLANS[name])
        for seed, (shape, sequences) in enumerate(SHAPES.items()):
            assert error_of(block_mask(sequences, seed, rule=rule), OPTIONS[option]) < 1e-10, (name, shape)


@given(sequence_batches(max_length=20), st.integers(0, 10**6), st.sampled_from(list(OPTIONS)), st.integers(2, 12))
def test_random_trees(sequences: Sequences, seed: int, option: str, longest: int) -> None:
    for plan in plans_for(OPTIONS[option].window):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_plan, "_UNIT", 1 + seed % 5)
            patch.setattr(cpu_plan, "_BLOCK", 2 + seed % 7)
            patch.setattr(cpu, "plan", PLANS[plan])
            mask = block_mask(sequences, seed, longest, RULES[seed % 2])
            assert error_of(mask, OPTIONS[option], queries=1 + seed % len(mask)) < 1e-10


def offsets(length: int) -> list[PrefixTree]:
    """A block of `length` tokens at every offset of a block of queries, from the start of its node to the end."""
    tree = PrefixTree.from_sequences(fork_at(3 * BLOCK + length, tail=5))
    return [with_blocks(tree, (start, start + length)) for start in range(3 * BLOCK + 1)]


@rules
@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("window", [None, 3, BLOCK + 2, 100])
def test_blocks_at_every_offset(
    monkeypatch: pytest.MonkeyPatch, small_blocks: None, length: int, window: int | None, rule: BlockRule
) -> None:
    for name in plans_for(window):
        monkeypatch.setattr(cpu, "plan", PLANS[name])
        for tree in offsets(length):
            check_cover(mask_of_tree(tree, rule), name, window)
        assert error_of(mask_of_tree(tree, rule), Options(window=window)) < 1e-10


def check_cover(mask: TreeMask, plan: str, window: int | None) -> None:
    """Each visible pair is computed once, and the first piece of each query before its others."""
    count = np.zeros((len(mask), len(mask)), dtype=int)
    begun = np.zeros(len(mask), dtype=int)
    for piece in PLANS[plan](*mask.host(), window, mask.blocks()):
        assert (begun[piece.q] == (0 if piece.first else 1)).all()
        begun[piece.q] = 1
        keys = np.arange(len(mask))[piece.k]
        block = np.ones((piece.q.stop - piece.q.start, len(keys)), dtype=int)
        if piece.causal:
            block = np.tril(block)
        if piece.bias is not None:
            block = (piece.bias == 0).numpy().astype(int)
        count[np.ix_(np.arange(len(mask))[piece.q], keys)] += block
    assert np.array_equal(count, mask.visible(window).numpy().astype(int))


@given(sequence_batches(max_length=20), st.integers(0, 10**6), st.sampled_from([None, 1, 4, 9]))
def test_each_visible_pair_is_computed_once(sequences: Sequences, seed: int, window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_plan, "_UNIT", UNIT)
        patch.setattr(cpu_plan, "_BLOCK", BLOCK)
        for plan in plans_for(window):
            check_cover(block_mask(sequences, seed, rule=RULES[seed % 2]), plan, window)


@rules
@pytest.mark.parametrize("window", [None, 100, 500])
def test_real_sizes(window: int | None, rule: BlockRule) -> None:
    """Images of 256 tokens in a prompt and in one answer, and one that is a whole answer."""
    image = run(256, seed=7)
    prompt = [*run(40), *image, *run(30, seed=1)]
    sequences = [[*prompt, 3, *run(90, seed=2), *image, *run(9)], [*prompt, 4, *run(50)], [*prompt, *run(256, seed=9)]]
    tree = PrefixTree.from_sequences(sequences)
    longest = tree.path(0)
    fork = int(tree.path(2)[len(prompt)])
    spans = [(40, 296), (int(longest[len(prompt) + 91]), int(longest[len(prompt) + 347])), (fork, fork + 256)]
    mask = mask_of_tree(with_blocks(tree, *spans), rule)
    assert error_of(mask, Options(window=window)) < 1e-10
    assert error_of(mask, Options(window=window), queries=len(mask) - 100) < 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@rules
@torch.no_grad()
def test_flex(rule: BlockRule) -> None:
    for option, seed in (("grouped", 0), ("window_5", 1), ("all_of_it", 2)):
        mask, options = block_mask(branching_comb(5, turn=20), seed, rule=rule), OPTIONS[option]
        x = Inputs(options, len(mask), torch.float32).leaves
        rest = (options.scale, options.window, options.softcap, x.get("sinks"))
        expected = reference_attention(x["q"], x["k"], x["v"], mask, *rest)
        found = flex_tree_attention(x["q"], x["k"], x["v"], mask, *rest)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        causal = flex_tree_attention(x["q"], x["k"], x["v"], mask.ruled("causal"), *rest)
        assert (causal - expected).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_causal_layer_is_bit_identical_to_a_tree_without_blocks(backend: str, window: int | None) -> None:
    options, mask = Options(window=window), block_mask(forest(), backend=backend)
    inputs = Inputs(options, len(mask), torch.float32)

    def attention(*arguments: object) -> torch.Tensor:
        return tree_attention(*arguments[:4], scale=0.5, window=window)

    for first in ("windowed", "causal"):  # plans of one are not taken for those of the other
        inputs.run(attention, mask.ruled(first))
    plain, causal, both = (
        inputs.run(attention, m) for m in (mask_of(forest(), backend), mask.ruled("causal"), mask.ruled("windowed"))
    )
    assert all(torch.equal(causal[name], plain[name]) for name in plain)
    assert relative_error(both, plain) > 0.1


def test_masks_of_all_rules_share_their_counts_and_make_plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(cpu, "plan", lambda *a: calls.append(a) or cpu_plan.plan(*a))
    mask = block_mask(star(4))
    inputs = Inputs(Options(window=3), len(mask), torch.float32)
    for _layer in range(3):
        for rule in ("windowed", "whole", "causal"):
            inputs.run(cpu_attention, mask.ruled(rule))
    assert len(calls) == 3 and mask.ruled("windowed") is mask and mask.ruled("whole").calls is mask.calls
    plain = mask_of(star(4))
    assert all(plain.ruled(rule) is plain for rule in ("windowed", "whole", "causal"))


def test_a_mask_of_tensors_alone() -> None:
    mask = block_mask(star(4), longest=5)
    alone = TreeMask(mask.exit, mask.depth, reach=mask.reach)
    assert error_of(alone, Options()) < 1e-10 and torch.equal(alone.visible(2), mask.visible(2))


def test_ranges_of_positions_are_refused() -> None:
    mask = block_mask(star(4))
    x = Inputs(Options(), len(mask), torch.float32).leaves
    with pytest.raises(UnsupportedError, match="ranges of 3 positions in a layer whose images attend both ways"):
        chunked_tree_attention(x["q"], x["k"], x["v"], mask, 3)
    chunked_tree_attention(x["q"], x["k"], x["v"], mask.ruled("causal"), 3)


@given(sequence_batches(max_length=20), st.integers(0, 10**6))
def test_cuts(sequences: Sequences, seed: int) -> None:
    tree = with_random_blocks(PrefixTree.from_sequences(sequences), seed)
    reach = tree.reach
    assert reach is not None
    places = [place for place in range(tree.tree_tokens + 1) if place == 0 or reach[place - 1] <= place]
    for place in range(tree.tree_tokens + 1):
        assert cut_before(reach, place) == max(p for p in places if p <= place)
        assert cut_after(reach, place) == min(p for p in places if p >= place)


@given(sequence_batches(max_length=20), st.integers(0, 10**6))
def test_pairs_are_counted(sequences: Sequences, seed: int) -> None:
    tree = with_random_blocks(PrefixTree.from_sequences(sequences), seed)
    assert tree.visible_pairs() == int(mask_of_tree(tree).visible().sum())
    dense = sum(int(dense_visible(tree, s, "windowed", None).sum()) for s in range(tree.num_sequences))
    assert tree.flat_visible_pairs() == dense
    causal = replace(tree, reach=None)
    assert causal.visible_pairs() == int(mask_of_tree(causal).visible().sum())
