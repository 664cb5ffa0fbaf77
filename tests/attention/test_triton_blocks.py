"""The Triton kernels on trees with blocks that attend both ways, against the float64 reference, forward and backward.

As tests/attention/test_triton.py, on the GPU or under Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dta_plugin import PrefixTree
from dta_plugin.attention import api, self_check, tiles, triton_backend
from dta_plugin.attention.api import tree_attention
from dta_plugin.attention.blocks import BlockRule
from dta_plugin.attention.reference import reference_attention
from dta_plugin.attention.self_check import Kind
from dta_plugin.attention.triton_backend import triton_attention
from dta_plugin.attention.triton_table import Launch, Launches
from tests.attention.test_triton_random import TILES, random_forest
from tests.support.attention_variants import Inputs, Options, mask_of, relative_error
from tests.support.blocks import RULES, block_mask, mask_of_tree, with_blocks
from tests.support.interpreter import DEVICE, ON_GPU
from tests.support.trees import SHAPES, branching_comb, fork_at, star
from tests.support.triton_checks import VARIANTS, check_mask, poisoned_memory

__all__ = ["poisoned_memory"]

SMALL = Launches(Launch(32, 16, 4, 2), Launch(16, 32, 4, 2), Launch(16, 32, 4, 2))
TWO_PASSES = Launches(Launch(32, 16, 4, 2), Launch(16, 32, 4, 2, True), Launch(16, 32, 4, 2), Launch(32, 16, 4, 2))
rules = pytest.mark.parametrize("rule", RULES)
# Rules and windows that are tried at length only: minutes in the interpreter.
LONG = [("windowed", 9), ("whole", 50)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and splits so small that little trees have many of both."""
    monkeypatch.setattr(triton_backend, "launches", lambda *_: SMALL)
    monkeypatch.setattr(tiles, "_FEWEST_VISITS", 2)


@rules
@pytest.mark.parametrize("option", ["grouped", "all_of_it"])
def test_shapes(small_tiles: None, option: str, rule: BlockRule) -> None:
    for seed, name in enumerate(("single_sequence", "branching_comb", "binary", "forest")):
        check_mask(block_mask(SHAPES[name], seed, rule=rule, device=DEVICE), VARIANTS[option])


@pytest.mark.parametrize("length", [7, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("rule", "window"),
    [("windowed", None), ("whole", 9), *(pytest.param(*each, marks=pytest.mark.long) for each in LONG)],
)
def test_blocks_at_every_offset_of_a_tile(small_tiles: None, length: int, rule: BlockRule, window: int | None) -> None:
    """Shorter and longer than a tile and than the window; at the start of a node, and at its end."""
    options = replace(VARIANTS["plain"], q_heads=1, kv_heads=1, window=window)
    tree = PrefixTree.from_sequences(fork_at(72, tail=5))
    for start in [*range(0, 33, 4), 72 - length]:
        check_mask(mask_of_tree(with_blocks(tree, (start, start + length)), rule, device=DEVICE), options)


@rules
def test_two_passes_and_descriptors(small_tiles: None, monkeypatch: pytest.MonkeyPatch, rule: BlockRule) -> None:
    monkeypatch.setattr(triton_backend, "launches", lambda *_: TWO_PASSES)
    options = replace(VARIANTS["all_of_it"], value_dim=48)
    check_mask(block_mask(branching_comb(5, turn=12), 1, 30, rule, device=DEVICE), options)
    check_mask(block_mask(branching_comb(5, turn=12), 2, 30, rule, device=DEVICE), options, torch.bfloat16, queries=17)


@pytest.mark.parametrize(("option", "rule"), [("grouped", "windowed"), ("window_5", "windowed"), ("window_5", "whole")])
def test_queries_that_follow_the_keys_of_their_ancestors(small_tiles: None, option: str, rule: BlockRule) -> None:
    mask = block_mask(star(4, prefix=40, branch=9), 1, longest=12, rule=rule, device=DEVICE)
    for queries in (7, len(mask) // 2, len(mask) - 1):
        check_mask(mask, replace(VARIANTS[option], q_heads=2, kv_heads=1), queries=queries)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_random_forests(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    forward, queries, keys, values = (Launch(*TILES[(seed // n) % len(TILES)], 4, 2) for n in (1, 2, 3, 5))
    sizes = Launches(forward, replace(queries, described=seed % 2 == 0), keys, values if seed % 3 else None)
    monkeypatch.setattr(triton_backend, "launches", lambda *_: sizes)
    monkeypatch.setattr(tiles, "_FEWEST_VISITS", 1 + seed % 5)
    mask = block_mask(random_forest(seed), seed, longest=40, rule=RULES[seed % 2], device=DEVICE)
    options = replace(list(VARIANTS.values())[seed % len(VARIANTS)], q_heads=1, kv_heads=1)
    check_mask(mask, options, torch.float32 if seed % 4 else torch.bfloat16)


def test_a_causal_layer_is_bit_identical_to_a_tree_without_blocks(small_tiles: None) -> None:
    sequences = branching_comb(5, turn=12)
    mask = block_mask(sequences, device=DEVICE)
    inputs = Inputs(VARIANTS["window_5"], len(mask), torch.float32, DEVICE)
    both = inputs.run(triton_attention, mask)
    causal, plain = (inputs.run(triton_attention, m) for m in (mask.ruled("causal"), mask_of(sequences, device=DEVICE)))
    assert all(torch.equal(causal[name], plain[name]) for name in plain)
    assert relative_error(both, plain) > 0.1


def test_negative_control_tiles_of_a_causal_mask(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree.from_sequences(fork_at(72, tail=5))
    mask = mask_of_tree(with_blocks(tree, (10, 60)), device=DEVICE)
    inputs = Inputs(VARIANTS["grouped"], len(mask), torch.float32, DEVICE)
    truth = inputs.run(reference_attention, mask)
    assert relative_error(inputs.run(triton_attention, mask), truth) < 1e-5
    mask._plans.clear()
    monkeypatch.setattr(triton_backend, "tile_pairs", lambda *a: tiles.tile_pairs(*a[:-1]))
    assert not relative_error(inputs.run(triton_attention, mask), truth) < 1e-2


KINDS = [
    Kind(DEVICE, torch.float32, (16, 16), 2, blocks=True),
    Kind(DEVICE, torch.float32, (16, 16), 2, window=True, blocks=True),
    Kind(DEVICE, torch.bfloat16, (16, 16), 2, window=True, softcap=True, sinks=True, blocks=True, whole_blocks=True),
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, on a device that the kernels serve."""
    monkeypatch.setattr(self_check, "_outcomes", {})
    monkeypatch.setattr(self_check, "_tree", lambda: PrefixTree.from_sequences(star(2, prefix=90, branch=20)))
    if not ON_GPU:
        size = Launch(64, 64, 4, 2)
        monkeypatch.setattr(triton_backend, "launches", lambda *_: Launches(size, size, size))
        monkeypatch.setattr(api, "triton_obstacle", lambda *_: None)
        monkeypatch.setattr(api, "resolve_backend", lambda *_: "triton")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_of_blocks_has_a_self_check_of_its_own(
    served: None, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    assert self_check.self_check(kind).problem is None
    if kind.whole_blocks:
        right = triton_backend.TritonKernels._limits
        monkeypatch.setattr(triton_backend.TritonKernels, "_limits", lambda self: (right(self)[0], None))
    else:
        monkeypatch.setattr(triton_backend.TritonKernels, "_limits", lambda self: (None, None))
    monkeypatch.setattr(self_check, "_outcomes", {})
    problem = self_check.self_check(kind).problem
    assert problem is not None and "differ from the reference" in problem and "blocks" in problem


def test_calls_ask_for_their_kind(served: None) -> None:
    sequences = star(3, prefix=20, branch=9)
    x = Inputs(Options(head_dim=16, value_dim=16), len(mask_of(sequences)), torch.float32, DEVICE).leaves
    mask = block_mask(sequences, device=DEVICE)
    for rule, window in (("causal", 9), ("windowed", None), ("whole", None), ("windowed", 9), ("whole", 9)):
        tree_attention(x["q"], x["k"], x["v"], mask.ruled(rule), window=window)
    found = {(kind.window, kind.blocks, kind.whole_blocks) for kind in self_check._outcomes}
    assert found == {(True, False, False), (False, True, False), (True, True, False), (True, True, True)}
    assert mask.backends_used == {"triton"}
