"""Trees with blocks of tokens that attend both ways, and the masks that models make of such sequences densely."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from dta_plugin import PrefixTree, TreeLayout, TreeMask
from dta_plugin.attention.blocks import BlockRule
from tests.support.trees import Sequences

RULES: tuple[BlockRule, ...] = ("windowed", "whole")


def with_blocks(tree: PrefixTree, *spans: tuple[int, int]) -> PrefixTree:
    """spans: (start, stop) of blocks in the layout."""
    reach = np.arange(1, tree.tree_tokens + 1)
    for start, stop in spans:
        reach[start:stop] = stop
    return replace(tree, reach=reach)


def with_random_blocks(tree: PrefixTree, seed: int, longest: int = 9) -> PrefixTree:
    """Blocks of up to `longest` tokens, side by side or apart, up to both ends of nodes. No sequence ends in one."""
    generator = random.Random(seed)
    ends = {*(tree.node_start[1:]).tolist(), *(tree.paths[tree.offsets[1:] - 1] + 1).tolist()}
    spans, start = [], 0
    for end in sorted(ends):
        while start < end:
            stop = min(end, start + generator.choice([1, generator.randint(2, longest)]))
            spans.append((start, stop))
            start = stop
    return with_blocks(tree, *spans)


def block_mask(
    sequences: Sequences,
    seed: int = 0,
    longest: int = 9,
    rule: BlockRule = "windowed",
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> TreeMask:
    return mask_of_tree(with_random_blocks(PrefixTree.from_sequences(sequences), seed, longest), rule, backend, device)


def mask_of_tree(
    tree: PrefixTree, rule: BlockRule = "windowed", backend: str = "auto", device: torch.device | str = "cpu"
) -> TreeMask:
    return TreeMask.from_layout(TreeLayout.from_tree(tree, device), backend).ruled(rule)


def dense_visible(tree: PrefixTree, sequence: int, rule: BlockRule, window: int | None) -> torch.Tensor:
    """Bool [len, len] of one sequence alone, as transformers' masks have it: causal, or-ed with blocks, and windows."""
    path = tree.path(sequence)
    assert tree.reach is not None
    ends = torch.from_numpy(tree.reach[path] - path + np.arange(len(path)))
    place = torch.arange(len(path))
    causal = place[None] <= place[:, None]
    block = ends[None] == ends[:, None]
    near = torch.ones_like(causal) if window is None else place[None] > place[:, None] - window
    if rule == "causal":
        return causal & near
    return (causal | block) & near if rule == "windowed" else (causal & near) | block
