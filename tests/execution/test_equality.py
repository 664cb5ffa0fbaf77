"""`sequence_logprobs` against the oracle: log-probs, entropies and the gradient of every parameter.

Eight families, every shape, float64 and float32; about 1,000 random trees; and sabotages that must be noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.attention import cpu_plan
from tests.support.models import FAMILIES, softmax_in_own_dtype, tiny_model
from tests.support.oracle import Result, dense, difference, gradient_error, gradient_norm, rms
from tests.support.tree_run import (
    TOLERANCE,
    bfloat16_and_its_truth,
    drop_gradient_of_one_child,
    drop_key_gradient_of_one_block,
    make_siblings_visible,
    model_pair,
    through_tree,
    use_layout_positions,
)
from tests.support.trees import BLOCK_FORKS, SHAPES, Sequences, branching_comb, run, sequence_batches, star

FUZZED = [family for family in FAMILIES if family != "gemma2"]
MODEL_SHAPES = SHAPES | {name: BLOCK_FORKS[name] for name in BLOCK_FORKS if not name.endswith("long")}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def assert_equal(actual: Result, expected: Result, dtype: torch.dtype = torch.float64) -> None:
    found = difference(actual, expected)
    assert found.worst <= TOLERANCE[dtype], found


@DTYPES
@pytest.mark.parametrize("name", MODEL_SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape(family: str, name: str, dtype: torch.dtype) -> None:
    pristine, model = model_pair(family, dtype)
    assert_equal(through_tree(model, MODEL_SHAPES[name]), dense(pristine, MODEL_SHAPES[name]), dtype)


@pytest.mark.parametrize(
    "family,dtype",
    [
        ("llama", torch.float64),
        ("llama", torch.float32),
        ("gpt_oss", torch.float32),
        *(pytest.param(family, torch.float64, marks=pytest.mark.slow) for family in FAMILIES if family != "llama"),
    ],
    ids=str,
)
def test_fan_out_1000(family: str, dtype: torch.dtype) -> None:
    pristine, model = model_pair(family, dtype)
    sequences = star(1000)
    assert_equal(through_tree(model, sequences), dense(pristine, sequences), dtype)


@pytest.mark.parametrize("offset", range(1, 18))
def test_forks_at_every_offset_of_a_block(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    monkeypatch.setattr(cpu_plan, "_UNIT", 4)
    monkeypatch.setattr(cpu_plan, "_BLOCK", 8)
    sequences = [[*run(offset), *branch] for branch in ([3, *run(9, seed=1)], [4, *run(9, seed=2)], [5])]
    for family in ("llama", "gpt_oss"):
        pristine, model = model_pair(family, torch.float64)
        assert_equal(through_tree(model, sequences), dense(pristine, sequences))


def check_random_tree(family: str, sequences: Sequences, first: int | None, temperature: float) -> None:
    pristine, model = model_pair(family, torch.float64)
    scored = None if first is None else [first] * len(sequences)
    expected = dense(pristine, sequences, scored, temperature)
    assert_equal(through_tree(model, sequences, scored, temperature), expected)


@pytest.mark.parametrize("family", FUZZED)
@settings(max_examples=143)
@given(sequence_batches(), st.sampled_from([None, None, 1, 4]), st.sampled_from([1.0, 0.7]))
def test_random_trees(family: str, sequences: Sequences, first: int | None, temperature: float) -> None:
    check_random_tree(family, sequences, first, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=300, derandomize=False)
@given(sequence_batches(20, 40), st.sampled_from([None, 1, 4, 20]), st.floats(0.5, 2.0), st.sampled_from([1, 3, 7, 64]))
def test_larger_random_trees(
    family: str, sequences: Sequences, first: int | None, temperature: float, unit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_plan, "_UNIT", unit)
        patch.setattr(cpu_plan, "_BLOCK", 2 * unit)
        check_random_tree(family, sequences, first, temperature)


@pytest.mark.parametrize("family", FAMILIES)
def test_scored_tokens_only(family: str) -> None:
    pristine, model = model_pair(family, torch.float64)
    sequences = branching_comb(4)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(len(s), generator=generator) < 0.5 for s in sequences]
    for scored in (masks, [mask.tolist() for mask in masks], [2] * len(sequences), [len(s) for s in sequences]):
        actual = through_tree(model, sequences, scored)
        assert_equal(actual, dense(pristine, sequences, scored))
    assert all(torch.equal(row, torch.zeros_like(row)) for row in actual.logprobs), "nothing scored: exactly 0"


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, use_reentrant: bool) -> None:
    sequences = branching_comb(4)
    model = tiny_model(family, torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_equal(through_tree(model, sequences), dense(model_pair(family, torch.float64)[0], sequences))


@pytest.mark.parametrize(
    "options",
    [{"backend": "reference"}, {"executor": "packed", "max_tree_tokens_per_chunk": 1}],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_do_not_change_the_result(family: str, options: dict[str, object]) -> None:
    pristine, model = model_pair(family, torch.float64)
    sequences = SHAPES["forest"][::-1]
    config = TreeConfig.from_options(options)
    assert_equal(through_tree(model, sequences, config=config), dense(pristine, sequences))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_tied_embeddings(family: str) -> None:
    pristine, model = (tiny_model(family, torch.float64, tie_word_embeddings=True) for _ in range(2))
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert_equal(through_tree(model, star(5)), dense(pristine, star(5)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_worse_than_dense_bfloat16(family: str) -> None:
    """Gradient errors to float32, root mean square over seeds: one seed alone is noise."""
    sequences = star(12, prefix=11, branch=3)
    found, allowed = [], []
    for seed in range(4):
        model, pristine, wide = bfloat16_and_its_truth(family, seed)
        truth = dense(wide, sequences)
        found.append(gradient_error(through_tree(model, sequences), truth))
        allowed.append(gradient_error(dense(pristine, sequences), truth))
    assert rms(found) <= 1.1 * rms(allowed)


@pytest.mark.parametrize("where", ["shared tokens", "all tokens"])
def test_fan_out_1000_in_bfloat16_loses_no_gradient(where: str) -> None:
    """1,000 small gradients of one sign meet in the shared tokens: a bfloat16 sum would stall and halve the result."""
    model, _, wide = bfloat16_and_its_truth("llama")
    sequences = star(1000, prefix=8)
    scored = None if where == "all tokens" else [torch.arange(10) < 8] * 1000
    norms = [
        gradient_norm(through_tree(m, sequences, scored, loss=lambda logprobs, _: -torch.cat(logprobs).mean()))
        for m in (model, wide)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


SABOTAGES = [
    make_siblings_visible,
    use_layout_positions,
    drop_gradient_of_one_child,
    drop_key_gradient_of_one_block,
]


@DTYPES
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_negative_controls(
    monkeypatch: pytest.MonkeyPatch, family: str, sabotage: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype
) -> None:
    pristine, model = model_pair(family, dtype)
    monkeypatch.setattr(cpu_plan, "_UNIT", 2)
    monkeypatch.setattr(cpu_plan, "_BLOCK", 4)
    sequences = star(8, prefix=6, branch=4)
    expected = dense(pristine, sequences)
    assert_equal(through_tree(model, sequences), expected, dtype)
    sabotage(monkeypatch)
    found = difference(through_tree(model, sequences), expected)
    assert found.gradients > 100 * TOLERANCE[dtype]
    if sabotage in (drop_gradient_of_one_child, drop_key_gradient_of_one_block):
        assert max(found.logprobs, found.entropies) <= TOLERANCE[dtype], "only gradients were touched"
    else:
        assert found.logprobs > 1e-2


def test_shape_and_dtype_of_the_result() -> None:
    sequences = [torch.tensor([5, 6, 7]), [5, 6], [9]]
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        out = dta_plugin.sequence_logprobs(tiny_model("llama", dtype), sequences)
        assert [row.shape for row in out.logprobs] == [(2,), (1,), (0,)]
        assert all(row.dtype is expected and row.requires_grad for row in out.logprobs)
        assert (out.entropies, out.router_loss) == (None, None)
        assert (out.report.tree.num_sequences, out.report.flat_tokens, out.report.tree_tokens) == (3, 6, 4)
        assert (out.report.executor, out.report.backend, out.report.chunks) == ("packed", "cpu", 1)
