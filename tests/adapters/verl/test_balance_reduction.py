"""How much of what siblings share reaches the model: verl's order, and ours, in micro-batches under a token budget.

128 prompts of 1,024 tokens, 8 responses each of lognormal length, mini-batches of 32 prompts, 16k tokens per
micro-batch. Orders come from verl's trainers, stock micro-batches from verl's `rearrange_micro_batches`, tree tokens
from trees that are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest

pytest.importorskip("verl", reason="verl is not installed; it needs an environment of its own")

import torch
from tensordict import TensorDict
from verl.utils.seqlen_balancing import rearrange_micro_batches

from dta_plugin import PrefixTree
from dta_plugin.balance import pack
from tests.adapters.verl.batches import Row, in_random_order, shares_of, star_rows, trainer
from tests.adapters.verl.test_balance import balanced

PROMPTS, N, MINI_BATCH, BUDGET = 128, 8, 32, 16384
MicroBatches = list[list[Row]]


@cache
def rollouts() -> list[Row]:
    return in_random_order(star_rows(PROMPTS, N, prompt=1024, median=600))


def shares(ranks: int, version: str, **options: object) -> list[list[list[Row]]]:
    rows = balanced(version, rollouts(), {}, trainer(version, ranks, MINI_BATCH, N, **options))
    return shares_of(rows, ranks, steps=PROMPTS // MINI_BATCH)


def stock_micro_batches(share: Sequence[Row]) -> MicroBatches:
    ids = torch.nested.as_nested_tensor([torch.empty(len(row.tokens)) for row in share], layout=torch.jagged)
    _, indices = rearrange_micro_batches(TensorDict({"input_ids": ids}, [len(share)]), max_token_len=BUDGET)
    return [[share[i] for i in members] for members in indices]


def tree_micro_batches(step: Sequence[Sequence[Row]]) -> list[MicroBatches]:
    """Per rank; as many on every one, as FSDP needs."""
    tokens = [[row.tokens for row in share] for share in step]
    count = max(len(pack(own, BUDGET).bins) for own in tokens)
    packed = [pack(own, BUDGET, at_least=count) for own in tokens]
    return [[[share[i] for i in members] for members in p.bins] for share, p in zip(step, packed, strict=True)]


def reduction(micro_batches: Sequence[Sequence[Row]]) -> float:
    trees = [PrefixTree.from_sequences([row.tokens for row in rows]) for rows in micro_batches]
    assert sum(tree.num_sequences for tree in trees) == PROMPTS * N
    return sum(tree.flat_tokens for tree in trees) / sum(tree.tree_tokens for tree in trees)


@pytest.mark.parametrize(("version", "ranks"), [("v1", 1), ("v1", 2), ("v1", 8), ("v0", 8)])
def test_token_reduction(version: str, ranks: int) -> None:
    ideal = PrefixTree.from_sequences([row.tokens for row in rollouts()]).compression_ratio
    stock_shares, our_shares = shares(ranks, version, use_dta=False), shares(ranks, version)
    stock = [rows for step in stock_shares for share in step for rows in stock_micro_batches(share)]
    worker_only = [rows for step in stock_shares for own in tree_micro_batches(step) for rows in own]
    ours = [rows for step in our_shares for own in tree_micro_batches(step) for rows in own]
    found = [reduction(micro_batches) for micro_batches in (stock, worker_only, ours)]
    print(
        f"{version} dp={ranks}: stock {found[0]:.3f}x in {len(stock)} micro-batches, worker only {found[1]:.3f}x in "
        f"{len(worker_only)}, ours {found[2]:.3f}x in {len(ours)}, ideal {ideal:.3f}x"
    )
    assert found[2] >= 0.95 * ideal
    assert max(PrefixTree.from_sequences([row.tokens for row in rows]).tree_tokens for rows in ours) <= BUDGET
    assert found[0] < 1.1 and found[1] < 0.8 * ideal  # negative controls: neither order nor packing alone suffices
