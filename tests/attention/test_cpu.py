"""The CPU path against the reference: every shape, every variant, both plans, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dta_plugin import InvalidInputError, TreeMask, tree_attention
from dta_plugin.attention import cpu, cpu_plan
from dta_plugin.attention.cpu import cpu_attention
from dta_plugin.attention.reference import reference_attention
from tests.support.attention_variants import (
    OPTIONS,
    Attention,
    Inputs,
    Options,
    Outputs,
    dense_in_own_dtype,
    mask_of,
    relative_error,
)
from tests.support.trees import (
    BLOCK_FORKS,
    SHAPES,
    WIDE,
    Sequences,
    branching_comb,
    forest,
    fork_at,
    run,
    sequence_batches,
    star,
)

PLANS = ("cascade", "blocks", "plan")
SMALL_UNIT, SMALL_BLOCK = 4, 8
SMALL_FORKS = {f"fork_{offset}": fork_at(offset, tail=5) for offset in range(1, 2 * SMALL_BLOCK + 2)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and blocks so small that little trees have many of both."""
    monkeypatch.setattr(cpu_plan, "_UNIT", SMALL_UNIT)
    monkeypatch.setattr(cpu_plan, "_BLOCK", SMALL_BLOCK)


def force_plan(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "cascade":
        monkeypatch.setattr(cpu, "plan", lambda exit, depth, window, blocks: cpu_plan.cascade(exit, depth, blocks))
    elif name == "blocks":
        monkeypatch.setattr(cpu, "plan", cpu_plan.blocks)


def error_of(sequences: Sequences, options: Options, dtype: torch.dtype = torch.float64) -> float:
    mask = mask_of(sequences)
    truth = Inputs(options, len(mask), torch.float64).run(reference_attention, mask)
    return relative_error(Inputs(options, len(mask), dtype).run(cpu_attention, mask), truth)


def plans_for(option: str) -> tuple[str, ...]:
    """The cascade knows no window."""
    return PLANS if OPTIONS[option].window is None else PLANS[1:]


@pytest.mark.parametrize("plan,option", [(plan, option) for option in OPTIONS for plan in plans_for(option)])
def test_every_shape(monkeypatch: pytest.MonkeyPatch, small_blocks: None, plan: str, option: str) -> None:
    force_plan(monkeypatch, plan)
    for name, sequences in (SHAPES | SMALL_FORKS).items():
        assert error_of(sequences, OPTIONS[option]) < 1e-10, name


@pytest.mark.parametrize("option", ["grouped", "softcap", "window_5", "window_and_sinks"])
@pytest.mark.parametrize("name", [*BLOCK_FORKS, *WIDE])
def test_real_block_sizes(name: str, option: str) -> None:
    assert error_of((BLOCK_FORKS | WIDE)[name], OPTIONS[option]) < 1e-10


@pytest.mark.parametrize("plan", ["cascade", "blocks"])
@pytest.mark.parametrize("name", [*BLOCK_FORKS, *WIDE])
def test_real_block_sizes_of_both_plans(monkeypatch: pytest.MonkeyPatch, plan: str, name: str) -> None:
    force_plan(monkeypatch, plan)
    assert error_of((BLOCK_FORKS | WIDE)[name], OPTIONS["grouped"]) < 1e-10


@pytest.mark.parametrize("option", OPTIONS)
def test_float32(option: str) -> None:
    for name in ("star_33", "deep_chain", "branching_comb", "forest", "single_token"):
        assert error_of(SHAPES[name], OPTIONS[option], torch.float32) < 2e-6, name


@pytest.mark.parametrize("window", [None, 700])
def test_rows_whose_first_keys_are_all_hidden(window: int | None) -> None:
    """A block with the end of a deep branch and the start of a shallow one: hundreds of hidden keys come first."""
    sequences = [run(1300), [*run(70), 3, 4, 5], [*run(10), 5, 6]]
    assert error_of(sequences, Options(window=window)) < 1e-10


@given(sequence_batches(max_sequences=10, max_length=14), st.sampled_from(list(OPTIONS)), st.integers(1, 9))
def test_random_trees(sequences: Sequences, option: str, unit: int) -> None:
    for plan in plans_for(option):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_plan, "_UNIT", unit)
            patch.setattr(cpu_plan, "_BLOCK", 2 * unit)
            force_plan(patch, plan)
            assert error_of(sequences, OPTIONS[option]) < 1e-10


@pytest.mark.parametrize("option", ["grouped", "window_5", "softcap", "all_of_it"])
@pytest.mark.parametrize("plan", ["cascade", "blocks"])
def test_queries_that_follow_the_keys_of_their_ancestors(
    monkeypatch: pytest.MonkeyPatch, small_blocks: None, plan: str, option: str
) -> None:
    force_plan(monkeypatch, plan if OPTIONS[option].window is None else "blocks")
    for sequences in (star(6, prefix=20, branch=9), forest(), branching_comb(5)):
        mask = mask_of(sequences)
        for queries in (1, 2, 7, len(mask) // 2, len(mask) - 1):
            inputs = Inputs(OPTIONS[option], len(mask), torch.float64, queries=queries)
            assert relative_error(inputs.run(cpu_attention, mask), inputs.run(reference_attention, mask)) < 1e-10


@pytest.mark.parametrize("option", ["grouped", "softcap"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_any_strides(option: str, name: str) -> None:
    mask, options = mask_of(forest()), OPTIONS[option]
    x = Inputs(options, len(mask), torch.float64).leaves
    arguments = (mask, options.scale, options.window, options.softcap)
    expected = cpu_attention(x["q"], x["k"], x["v"], *arguments)
    x[name] = x[name].mT.contiguous().mT
    torch.testing.assert_close(cpu_attention(x["q"], x["k"], x["v"], *arguments), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["grouped", "softcap", "sinks", "value_dim"])
def test_a_backward_pass_inside_autocast_keeps_its_precision(option: str) -> None:
    mask = mask_of(star(6, prefix=20, branch=9))
    inputs = Inputs(OPTIONS[option], len(mask), torch.float32)
    expected = inputs.run(cpu_attention, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = inputs.run(cpu_attention, mask)
    assert relative_error(found, expected) < 1e-6


def check_cover(sequences: Sequences, plan: str, window: int | None) -> None:
    mask = mask_of(sequences)
    exit_, depth = mask.exit.numpy(), mask.depth.numpy()
    pieces = cpu_plan.cascade(exit_, depth) if plan == "cascade" else getattr(cpu_plan, plan)(exit_, depth, window)
    count = np.zeros((len(mask), len(mask)), dtype=int)
    begun = np.zeros(len(mask), dtype=int)
    for piece in pieces:
        assert (begun[piece.q] == (0 if piece.first else 1)).all(), "one first piece per query, before its others"
        begun[piece.q] = 1
        keys = np.arange(len(mask))[piece.k]
        block = np.ones((piece.q.stop - piece.q.start, len(keys)), dtype=int)
        if piece.causal:
            block = np.tril(block)
        if piece.bias is not None:
            block = (piece.bias == 0).numpy().astype(int)
        count[np.ix_(np.arange(len(mask))[piece.q], keys)] += block
    assert np.array_equal(count, mask.visible(window).numpy().astype(int))


@pytest.mark.parametrize(
    "plan,window", [("cascade", None), ("blocks", None), ("plan", None), ("blocks", 5), ("plan", 5)]
)
def test_each_visible_pair_is_computed_once(small_blocks: None, plan: str, window: int | None) -> None:
    for sequences in (SHAPES | SMALL_FORKS).values():
        check_cover(sequences, plan, window)


@given(sequence_batches(max_sequences=10, max_length=20), st.sampled_from([None, 1, 4, 9]))
def test_each_visible_pair_is_computed_once_in_random_trees(sequences: Sequences, window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_plan, "_UNIT", SMALL_UNIT)
        patch.setattr(cpu_plan, "_BLOCK", SMALL_BLOCK)
        for plan in PLANS[1:] if window else PLANS:
            check_cover(sequences, plan, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["star_33", "deep_chain", "branching_comb", "star_1000"])
def test_half_precision_is_no_worse_than_dense(name: str, dtype: torch.dtype) -> None:
    mask, options = mask_of((SHAPES | WIDE)[name]), Options()

    def outputs(attention: Attention, dtype: torch.dtype) -> Outputs:
        return Inputs(options, len(mask), dtype).run(attention, mask)

    truth = outputs(reference_attention, torch.float32)
    allowed = relative_error(outputs(dense_in_own_dtype, dtype), truth)
    assert relative_error(outputs(cpu_attention, dtype), truth) <= 1.05 * allowed


@pytest.mark.parametrize("option", ["grouped", "window_5", "softcap", "sinks"])
def test_negative_control_siblings_made_visible(option: str) -> None:
    mask = mask_of(star(6))
    inputs = Inputs(OPTIONS[option], len(mask), torch.float64)
    wrong = TreeMask(torch.full_like(mask.exit, len(mask)), mask.depth)
    assert relative_error(inputs.run(cpu_attention, wrong), inputs.run(reference_attention, mask)) > 1e-2


@pytest.mark.parametrize("plan", ["cascade", "blocks"])
def test_negative_control_dropped_piece(monkeypatch: pytest.MonkeyPatch, small_blocks: None, plan: str) -> None:
    force_plan(monkeypatch, plan)
    whole = cpu.plan
    monkeypatch.setattr(cpu, "plan", lambda *arguments: whole(*arguments)[:-1])
    assert error_of(star(6, prefix=20, branch=9), OPTIONS["grouped"]) > 1e-2


def test_negative_control_dropped_gradient_of_one_piece(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    force_plan(monkeypatch, "cascade")
    add, dropped = cpu._add, []

    def drop_first(total: torch.Tensor, part: torch.Tensor, piece: cpu_plan.Piece) -> None:
        if piece.first or dropped:
            add(total, part, piece)
        else:
            dropped.append(piece)

    monkeypatch.setattr(cpu, "_add", drop_first)
    assert error_of(star(6, prefix=20, branch=9), OPTIONS["grouped"]) > 1e-2


def test_a_derivative_of_the_gradient_is_refused() -> None:
    mask = mask_of(SHAPES["forest"])
    leaves = Inputs(Options(), len(mask), torch.float64).leaves
    q = leaves["q"].clone().requires_grad_()
    out = cpu_attention(q, leaves["k"], leaves["v"], mask, 0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


INVALID: dict[str, tuple[dict[str, object], str]] = {
    "batch": ({"q": torch.zeros(2, 4, 5, 8)}, r"q \(2, 4, 5, 8\).*Expected q \[1, Hq, Tq, D\].*as one row"),
    "tokens": ({"q": torch.zeros(1, 4, 6, 8)}, r"q \(1, 4, 6, 8\).*mask of 5 tokens"),
    "head_dim": ({"k": torch.zeros(1, 2, 5, 4)}, r"k \(1, 2, 5, 4\)"),
    "heads": ({"q": torch.zeros(1, 3, 5, 8)}, r"Hq a multiple of Hkv"),
    "dtype": ({"v": torch.zeros(1, 2, 5, 8).double()}, r"torch.float64 for q, k, v.*one dtype; cast"),
    "scale": ({"scale": 0.0}, r"scale=0.0. Expected None or a factor above 0"),
    "window": ({"window": 0}, r"window=0.*None or at least 1"),
    "softcap": ({"softcap": 0.0}, r"softcap=0.0. Expected None or a cap above 0"),
    "device": ({"sinks": torch.zeros(4, device="meta")}, r"mask and sinks on cpu, meta. Expected one device"),
    "sinks": ({"sinks": torch.zeros(2)}, r"sinks of shape \(2,\).*one per query head: \(4,\)"),
    "flex on CPU": ({"mask": mask_of([[1, 2, 3, 4, 5]], "flex")}, r"backend='flex'.*CPU.*Use backend='auto'"),
    "triton": (
        {"mask": mask_of([[1, 2, 3, 4, 5]], "triton")},
        r"backend='triton'.*on cpu.*NVIDIA GPU.*Use backend='auto'",
    ),
    "unknown": ({"mask": mask_of([[1, 2, 3, 4, 5]], "cuda")}, r"backend='cuda'. Expected one of auto, cpu"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments(case: str) -> None:
    changes, message = INVALID[case]
    arguments: dict[str, object] = {
        "q": torch.zeros(1, 4, 5, 8),
        "k": torch.zeros(1, 2, 5, 8),
        "v": torch.zeros(1, 2, 5, 8),
        "mask": mask_of([[1, 2, 3, 4, 5]]),
    }
    with pytest.raises(InvalidInputError, match=message):
        tree_attention(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_public_op_defaults(backend: str) -> None:
    mask = mask_of(SHAPES["forest"], backend)
    leaves = Inputs(Options(), len(mask), torch.float64).leaves
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    expected = reference_attention(q, k, v, mask, scale=8**-0.5)
    torch.testing.assert_close(tree_attention(q, k, v, mask), expected, rtol=0, atol=1e-12)
