"""The Triton kernels against the float64 reference: every shape and variant, forward and backward.

Runs on the GPU where there is one, otherwise under Triton's interpreter (tests/support/interpreter.py). The error
allowed is twice the dense kernel's own in the same dtype. Small tiles make little trees have many of them;
uninitialised memory is filled with NaN, so nothing may be left unwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

pytest.importorskip("triton")

from dta_plugin import PrefixTree, TreeConfig, TreeMask, tree_attention
from dta_plugin.attention import api, self_check, tiles, triton_backend
from dta_plugin.attention.reference import reference_attention
from dta_plugin.attention.tiles import Visits
from dta_plugin.attention.triton_backend import TritonKernels, triton_attention
from dta_plugin.attention.triton_table import Launch, Launches
from dta_plugin.verify import compare
from tests.support.attention_variants import Attention, Inputs, Options, dense_in_own_dtype, mask_of, relative_error
from tests.support.interpreter import DEVICE, ON_GPU, round_accumulators
from tests.support.models import tiny_model
from tests.support.trees import BLOCK_FORKS, SHAPES, WIDE, branching_comb, forest, fork_at, star
from tests.support.triton_checks import VARIANTS, check, poisoned_memory

__all__ = ["poisoned_memory"]

SMALL = Launches(Launch(32, 16, 4, 2), Launch(16, 32, 4, 2), Launch(16, 32, 4, 2))
# Gradients of keys and values one after the other, and keys that dQ reads through tensor descriptors.
TWO_PASSES = Launches(Launch(32, 16, 4, 2), Launch(16, 32, 4, 2, True), Launch(16, 32, 4, 2), Launch(32, 16, 4, 2))
FORKS = {f"fork_{offset}": fork_at(offset, tail=5) for offset in range(1, 34)}


def slow(value: object) -> ParameterSet:
    """A parameter that takes long in the interpreter, and that few runs of the suite need there."""
    return pytest.param(value, marks=[] if ON_GPU else pytest.mark.slow)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and splits so small that little trees have many of both."""
    monkeypatch.setattr(triton_backend, "launches", lambda *_: SMALL)
    monkeypatch.setattr(tiles, "_FEWEST_VISITS", 2)
    monkeypatch.setattr(self_check, "_tree", lambda: PrefixTree.from_sequences(star(3, prefix=20, branch=9)))


@pytest.mark.parametrize("option", VARIANTS)
def test_every_shape(small_tiles: None, option: str) -> None:
    for name, sequences in SHAPES.items():
        if name == "deep_chain" and option not in ("plain", "window_5", "all_of_it"):
            continue
        check(sequences, VARIANTS[option])


@pytest.mark.parametrize("option", ["plain", "window_and_sinks"])
def test_forks_at_every_offset_of_a_tile(small_tiles: None, option: str) -> None:
    for sequences in FORKS.values():
        check(sequences, replace(VARIANTS[option], q_heads=2, kv_heads=1))


@pytest.mark.parametrize("option", ["grouped", "value_dim", "all_of_it"])
def test_two_passes_and_descriptors(small_tiles: None, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(triton_backend, "launches", lambda *_: TWO_PASSES)
    wide = {16: 16, 24: 48}  # Triton 3.4's interpreter wants strides of 16 elements, where a GPU wants 16 bytes
    options = replace(VARIANTS[option], value_dim=wide[VARIANTS[option].value_dim])
    for name in ("star_33", "branching_comb", "binary", "forest", "single_token"):
        check(SHAPES[name], options)
    check(branching_comb(5), options, torch.bfloat16, queries=17)


def test_keys_that_descriptors_cannot_address() -> None:
    """A hardware descriptor wants starts and strides of 16 bytes; other keys go through pointers."""
    plain = torch.zeros(1, 2, 8, 24, dtype=torch.bfloat16)
    assert triton_backend._can_describe(plain, plain[..., 8:])
    assert not triton_backend._can_describe(plain, plain[..., 4:])
    assert not triton_backend._can_describe(torch.zeros(1, 2, 8, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", WIDE)
def test_fan_out_of_a_thousand(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wide = Launch(64, 64, 4, 2)
    monkeypatch.setattr(triton_backend, "launches", lambda *_: Launches(wide, wide, wide))
    for dtype in (torch.float32, torch.bfloat16):
        check(WIDE[name], Options(q_heads=1, kv_heads=1, head_dim=16, value_dim=16), dtype)


@pytest.mark.parametrize("softcap", [30.0, 50.0])
def test_soft_caps_of_real_models(small_tiles: None, softcap: float) -> None:
    check(SHAPES["star_33"], replace(VARIANTS["softcap"], softcap=softcap))


def error_on_shared_keys(attention: Attention, mask: TreeMask, name: str) -> float:
    """Of the gradients of a prompt's keys or values, to which 1,000 branches contribute with one sign, in bfloat16."""
    options = Options(q_heads=1, kv_heads=1, head_dim=16, value_dim=16)

    def gradient(attention: Attention, dtype: torch.dtype) -> torch.Tensor:
        inputs = Inputs(options, len(mask), dtype, DEVICE)
        inputs.leaves["out"] = inputs.leaves["out"].abs()
        return inputs.run(attention, mask)[name][:, :, :70].double()

    truth = gradient(reference_attention, torch.float64)
    return float((gradient(attention, torch.bfloat16) - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", [*map(slow, ("k", "v"))])
def test_a_thousand_contributions_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size = Launch(16, 16, 4, 2)
    monkeypatch.setattr(triton_backend, "launches", lambda *_: Launches(size, size, size))
    monkeypatch.setattr(tiles, "_FEWEST_VISITS", 10**6)  # one program per key tile
    mask = mask_of(WIDE["star_1000_one_token"], device=DEVICE)
    allowed = error_on_shared_keys(dense_in_own_dtype, mask, name)
    assert error_on_shared_keys(triton_attention, mask, name) <= allowed
    if not ON_GPU:  # negative control
        round_accumulators(monkeypatch)
        assert error_on_shared_keys(triton_attention, mask, name) > allowed


@pytest.mark.parametrize("name", BLOCK_FORKS)
def test_tiles_of_the_launch_table(name: str) -> None:
    dtype = torch.bfloat16 if name.endswith("long") else torch.float32
    check(BLOCK_FORKS[name], Options(q_heads=2, kv_heads=1, head_dim=64, value_dim=64, scale=0.2), dtype)


@pytest.mark.parametrize("head_dim", [64, 96, *map(slow, (80, 128, 192, 256, 320, 512))])
def test_head_dims(head_dim: int) -> None:
    options = Options(q_heads=2, kv_heads=1, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5)
    for dtype in (torch.float32, torch.bfloat16):
        check(star(4, prefix=130, branch=20), options, dtype)


def test_more_query_heads_than_a_power_of_two(small_tiles: None) -> None:
    check(branching_comb(5), Options(q_heads=14, kv_heads=2, head_dim=16, value_dim=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("option", [*map(slow, ("grouped", "window_5", "softcap", "sinks")), "all_of_it"])
def test_half_precision(small_tiles: None, option: str, dtype: torch.dtype) -> None:
    for name in ("star_33", "branching_comb", "binary", "forest"):
        check(SHAPES[name], VARIANTS[option], dtype)


@pytest.mark.parametrize("option", ["grouped", "window_5", "all_of_it"])
def test_queries_that_follow_the_keys_of_their_ancestors(small_tiles: None, option: str) -> None:
    for sequences in (star(6, prefix=20, branch=9), branching_comb(5)):
        tokens = len(mask_of(sequences))
        for queries in (1, 7, tokens // 2, tokens - 1):
            check(sequences, VARIANTS[option], queries=queries)


def test_key_gradients_are_added_to_what_descendants_left(small_tiles: None) -> None:
    mask, options = mask_of(star(9, prefix=60, branch=9), device=DEVICE), VARIANTS["grouped"]
    x = Inputs(options, len(mask), torch.float32, DEVICE, queries=50).leaves
    kernels = TritonKernels(mask, options.scale, None, None)
    out, lse = kernels.forward(x["q"], x["k"], x["v"], None)

    def key_gradients(start: float) -> tuple[torch.Tensor, torch.Tensor]:
        buffers = torch.full_like(x["k"], start), torch.full_like(x["v"], start)
        kernels.backward(x["out"], x["q"], x["k"], x["v"], out, lse, *buffers)
        return buffers

    for from_zero, from_three in zip(key_gradients(0.0), key_gradients(3.0), strict=True):
        torch.testing.assert_close(from_zero + 3.0, from_three, rtol=0, atol=1e-5)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "tokens_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


def test_any_strides(small_tiles: None) -> None:
    mask, options = mask_of(forest(), device=DEVICE), VARIANTS["grouped"]
    x = Inputs(options, len(mask), torch.float32, DEVICE).leaves

    def gradients(layout: str) -> list[torch.Tensor]:
        q, k, v = (x[name].clone().requires_grad_() for name in "qkv")
        views = [
            t.mT.contiguous().mT if layout == "columns" else t.transpose(1, 2).contiguous().transpose(1, 2)
            for t in (q, k, v)
        ]
        out = triton_attention(*(views if layout != "plain" else (q, k, v)), mask, options.scale)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]  # an expanded gradient, strides 0

    for layout in ("columns", "tokens_first"):
        for actual, expected in zip(gradients(layout), gradients("plain"), strict=True):
            assert torch.equal(actual, expected)


def test_strided_sinks(small_tiles: None) -> None:
    mask, options = mask_of(forest(), device=DEVICE), VARIANTS["sinks"]
    x = Inputs(options, len(mask), torch.float32, DEVICE).leaves
    strided = torch.stack([x["sinks"], x["sinks"] + 1], dim=1)[:, 0]
    for sinks in (x["sinks"], strided):
        out = triton_attention(x["q"], x["k"], x["v"], mask, options.scale, sinks=sinks)
        expected = reference_attention(x["q"], x["k"], x["v"], mask, options.scale, sinks=sinks)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 and newer")
def test_tf32_follows_the_switch_of_torch(small_tiles: None) -> None:
    """transformers' TrainingArguments(tf32=True) sets it in a way that makes torch's older switches raise."""
    before = torch.backends.fp32_precision
    assert not triton_backend.allows_tf32()
    try:
        torch.backends.fp32_precision = "tf32"
        assert triton_backend.allows_tf32()
        check(SHAPES["forest"], VARIANTS["plain"], torch.bfloat16)
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_two_backward_runs_are_bitwise_equal(small_tiles: None, dtype: torch.dtype) -> None:
    mask = mask_of(star(33, prefix=40, branch=3), device=DEVICE)
    inputs = Inputs(VARIANTS["grouped"], len(mask), dtype, DEVICE)
    assert splits_of(mask) > 0
    first, second = (inputs.run(triton_attention, mask) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def splits_of(mask: TreeMask) -> int:
    size = SMALL.key_gradient
    pairs = tiles.tile_pairs(*mask.host(), None, size.query_tile, size.key_tile)
    by_key = tiles.visits(pairs.key, pairs.query, pairs.full, -(-len(mask) // size.key_tile))
    return tiles.key_work(by_key, 3, 2, triton_backend._processors(DEVICE)).slots


def test_schedules_are_made_once_for_all_layers(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(triton_backend, "tile_pairs", lambda *a: calls.append(a) or tiles.tile_pairs(*a))
    mask = mask_of(forest(), device=DEVICE)
    inputs = Inputs(VARIANTS["grouped"], len(mask), torch.float32, DEVICE)
    for _layer in range(3):
        inputs.run(triton_attention, mask)
    assert len(calls) == 3  # forward, dQ, dK and dV


def test_whole_models(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(api, "triton_obstacle", lambda *_: None)
    for family in ("qwen3", "gpt_oss"):
        sequences = forest()
        difference = compare(tiny_model(family).to(DEVICE), sequences, config=TreeConfig(backend="triton"))
        assert difference.logprobs.most < 1e-5 and difference.worst_gradient[1] < 1e-5, family


BROKEN = star(6, prefix=40, branch=9)


def broken_error(wrong: TreeMask | None = None) -> float:
    mask = mask_of(BROKEN, device=DEVICE)
    inputs = Inputs(VARIANTS["grouped"], len(mask), torch.float32, DEVICE)
    return relative_error(inputs.run(triton_attention, wrong or mask), inputs.run(reference_attention, mask))


def test_negative_control_siblings_made_visible(small_tiles: None) -> None:
    mask = mask_of(BROKEN, device=DEVICE)
    assert broken_error(wrong=TreeMask(torch.full_like(mask.exit, len(mask)), mask.depth)) > 1e-2


def test_negative_control_masked_tiles_taken_for_full(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_full(*arguments: np.ndarray | int) -> Visits:
        found = tiles.visits(*arguments)  # type: ignore[arg-type]
        return replace(found, masked=found.start[1:].clone())

    monkeypatch.setattr(triton_backend, "visits", all_full)
    assert broken_error() > 1e-2


def test_negative_control_dropped_partial_sum(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_short(*arguments: Visits | int) -> tiles.KeyWork:
        work = tiles.key_work(*arguments)  # type: ignore[arg-type]
        assert work.slots
        start = work.split_start.clone()
        start[-1] -= 1
        return replace(work, split_start=start)

    monkeypatch.setattr(triton_backend, "key_work", one_short)
    assert broken_error() > 1e-2


def test_negative_control_dropped_visit(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_short(exit: np.ndarray, depth: np.ndarray, *rest: int) -> tiles.TilePairs:
        pairs = tiles.tile_pairs(exit, depth, *rest)
        return tiles.TilePairs(pairs.query[1:], pairs.key[1:], pairs.full[1:])

    monkeypatch.setattr(triton_backend, "tile_pairs", one_short)
    assert not broken_error() < 1e-2


@pytest.mark.skipif(ON_GPU, reason="the kernels serve this device")
def test_auto_is_not_triton_without_a_gpu() -> None:
    mask = mask_of(forest())
    x = Inputs(VARIANTS["plain"], len(mask), torch.float32).leaves
    tree_attention(x["q"], x["k"], x["v"], mask)
    assert mask.backends_used == {"cpu"}
