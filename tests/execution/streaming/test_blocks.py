"""Attention chunk by chunk through the arena, in trees with blocks that attend both ways, against all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import PrefixTree, tree_attention
from dta_plugin.attention.blocks import BlockRule
from dta_plugin.attention.trial import Outputs
from dta_plugin.execution.streaming.chunk_inputs import ChunkInputs, PlanInputs
from dta_plugin.execution.streaming.chunk_plan import CachedPath
from dta_plugin.execution.streaming.chunk_runner import chunk_mask
from dta_plugin.execution.streaming.chunking import plan_chunks
from dta_plugin.execution.streaming.kv_arena import Arena
from dta_plugin.tree.layout import ScoredEdges
from tests.support.attention_variants import Inputs, Options, relative_error
from tests.support.blocks import RULES, mask_of_tree, with_blocks, with_random_blocks
from tests.support.trees import Sequences, branching_comb, run, sequence_batches, star


def streamed(tree: PrefixTree, planned: PrefixTree, budget: int, rule: BlockRule, inputs: Inputs) -> Outputs:
    """Output and gradients of one layer over the chunks of `planned`: forward in order, backward in reverse."""
    plan = plan_chunks(planned, budget)
    chunks = PlanInputs(tree, ScoredEdges.from_tree(tree, None), plan)
    arena, path = Arena(plan.arena_tokens), CachedPath(plan)
    leaves = {name: inputs.leaves[name].clone().requires_grad_() for name in "qkv"}
    out = torch.zeros_like(inputs.leaves["out"])

    def attend(chunk: ChunkInputs, tokens: torch.Tensor) -> torch.Tensor:
        mask = chunk_mask(chunk, "cpu", arena).at_layer(0).ruled(rule)
        q, k, v = (leaves[name][:, :, tokens] for name in "qkv")
        return tree_attention(q, k, v, mask, scale=inputs.options.scale, window=inputs.options.window)

    with torch.no_grad():
        for index, chunk in enumerate(plan.chunks):
            tokens = torch.from_numpy(chunk.tokens)
            out[:, :, tokens] = attend(chunks.chunk(index), tokens)
            path.run(index)
    for index in reversed(range(len(plan.chunks))):
        for part in path.restore(index):
            above = plan.chunks[part.chunk]
            with torch.no_grad():
                again = torch.from_numpy(above.tokens[above.cached[part.start :]])
                attend(chunks.cached_tokens(part.chunk, part.start), again)
        tokens = torch.from_numpy(plan.chunks[index].tokens)
        attend(chunks.chunk(index), tokens).backward(inputs.leaves["out"][:, :, tokens])
        path.leave(index)
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out, **grads}


def error_of(
    tree: PrefixTree, budget: int, rule: BlockRule, window: int | None, planned: PrefixTree | None = None
) -> float:
    inputs = Inputs(Options(window=window), tree.tree_tokens, torch.float64)

    def at_once(q, k, v, mask, scale, window, *_):
        return tree_attention(q, k, v, mask, scale=scale, window=window)

    expected = inputs.run(at_once, mask_of_tree(tree, rule, "reference"))
    return relative_error(streamed(tree, planned or tree, budget, rule, inputs), expected)


@given(
    sequence_batches(max_sequences=10, max_length=20),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.sampled_from([None, 1, 3, 7]),
)
def test_random_trees(sequences: Sequences, budget: int, seed: int, window: int | None) -> None:
    tree = with_random_blocks(PrefixTree.from_sequences(sequences), seed, longest=2 + seed % 12)
    assert error_of(tree, budget, RULES[seed % 2], window) < 1e-10


@pytest.mark.parametrize("rule", [*RULES, "causal"])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_blocks_shorter_and_longer_than_the_budget(rule: BlockRule, window: int | None) -> None:
    """In a prompt of several chunks, at the ends of nodes, and below forks, where cached tokens run again."""
    for seed, sequences in enumerate((star(6, prefix=70, branch=30), branching_comb(8, turn=20), [run(90), run(40)])):
        tree = PrefixTree.from_sequences(sequences)
        for budget in (8, 25):
            assert error_of(with_random_blocks(tree, seed, longest=60), budget, rule, window) < 1e-10
            assert error_of(with_blocks(tree, (3, 19)), budget, rule, window) < 1e-10


def test_negative_control_blocks_that_are_cut() -> None:
    tree = with_blocks(PrefixTree.from_sequences(star(6, prefix=70, branch=30)), (3, 35))
    cut = replace(tree, reach=None)
    assert error_of(tree, 25, "windowed", None) < 1e-10
    assert error_of(tree, 25, "windowed", None, planned=cut) > 1e-2
