"""Every family with recurrent layers that runs on trees, against the unmodified model, one sequence at a time.

In float64, without the float32 islands of modeling files, nothing is left but the order of sums. In float32, a tree may
be off the truth by little more than the unmodified model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoModelForImageTextToText, PreTrainedModel

from dta_plugin import PrefixTree, TreeConfig
from dta_plugin.models import recurrent_layers, recurrent_registry
from dta_plugin.recurrent import delta_rule, state_space
from tests.support import recurrent_faults as faults
from tests.support import trees
from tests.support.oracle import Result, dense, difference
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import through_tree
from tests.support.trees import SHAPES, VOCABULARY, WIDE, Sequences, fork_at, run, sequence_batches
from tests.support.widened import widened

pytestmark = [
    pytest.mark.usefixtures("unprobed"),
    pytest.mark.skipif(Version(version("transformers")) < Version("5.24"), reason="families are newer"),
]

# A delta rule with a decay per head, one with a decay per channel, a convolution alone, and scans of Mamba 2 and 1.
SMOKE = ("qwen3_5_text", "kimi_linear", "lfm2", "bamba", "jamba")
FAMILIES = (
    *SMOKE,
    *("qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "bailing_hybrid", "lara_mini"),
    *("lfm2_moe", "lfm3", "mamba2", "nemotron_h", "falcon_h1", "granitemoehybrid", "zamba2"),
    *("mamba", "falcon_mamba"),
)
WITH_IMAGES = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl")
BUDGETS = (None, 1, 7, 64)  # None: packed
# By nodes, their one-token kernels leave out a bound on step lengths, or their scan begins from nothing.
UNBOUNDED, STATELESS = ("nemotron_h", "zamba2"), ("jamba", "mamba", "falcon_mamba")

EXACT, FLOAT32, NOTICED = 1e-10, 1e-5, 1e-4
# Rounding by another order of sums, as a multiple of what the unmodified model's own is.
_OTHER_ORDER = 4


def and_slow(names: Sequence[str], quick: Sequence[str]) -> list[ParameterSet]:
    """All of them as parameters; but for the quick ones, of the slow suite."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """With tokens enough for wide forks."""
    kind = {"kind": AutoModelForImageTextToText} if family in WITH_IMAGES else {}
    config = config_of(family)
    config.get_text_config().vocab_size = VOCABULARY
    return random_causal_lm(config, **kind).to(dtype)


def along(model: PreTrainedModel, sequences: Sequence[Sequence[int]], budget: int | None) -> Result:
    executor = "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    return through_tree(model, sequences, config=config, executor=executor)


def worst(family: str, sequences: Sequences, budgets: Sequence[int | None] = BUDGETS) -> dict[int | None, float]:
    """Largest difference from the unmodified model in float64, by budget."""
    with widened():
        expected = dense(model_of(family), sequences)
        return {n: difference(along(model_of(family), sequences, n), expected).worst for n in budgets}


@pytest.fixture
def node_after_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_registry, "way", recurrent_layers._nodes)


@pytest.mark.parametrize("family", and_slow(FAMILIES, SMOKE))
def test_exact(family: str) -> None:
    found = worst(family, forest(), [None, 7])
    assert max(found.values()) <= EXACT, found


@pytest.mark.usefixtures("node_after_node")
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_exact_node_after_node(family: str) -> None:
    found = worst(family, forest(), [None, 7])
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=() if n in SMOKE[:3] else pytest.mark.slow) for n in FAMILIES]
)
def test_float32_is_as_near_to_the_truth_as_the_unmodified_model(family: str) -> None:
    with widened():
        truth = dense(model_of(family), forest())
    model = model_of(family, torch.float32)
    noise = difference(dense(model, forest()), truth).worst
    found = {budget: difference(along(model, forest(), budget), truth).worst for budget in (None, 7)}
    print(f"{family}: noise {noise:.0e}, {found}")
    assert max(found.values()) <= max(FLOAT32, _OTHER_ORDER * noise), (noise, found)


@pytest.mark.parametrize(
    "family", [WITH_IMAGES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in WITH_IMAGES[1:])]
)
def test_models_that_see_images_on_text(family: str) -> None:
    found = worst(family, forest(), [None, 7])
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("shape", ["branching_comb", "duplicates", "prefix_of_another", "forest"])
def test_a_few_shapes(shape: str) -> None:
    found = worst("qwen3_5_text", SHAPES[shape], [None, 7])
    assert max(found.values()) <= EXACT, found


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_shapes(family: str, shape: str) -> None:
    tokens = PrefixTree.from_sequences(SHAPES[shape]).tree_tokens
    found = worst(family, SHAPES[shape], [budget for budget in BUDGETS if budget is None or budget < tokens])
    assert max(found.values()) <= EXACT, found


@pytest.mark.slow
@pytest.mark.usefixtures("node_after_node")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*UNBOUNDED, *STATELESS)])
def test_all_shapes_node_after_node(family: str, shape: str) -> None:
    found = worst(family, SHAPES[shape], [None, 7])
    assert max(found.values()) <= EXACT, found


@pytest.mark.slow
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("family", SMOKE)
def test_wide_forks(family: str, shape: str) -> None:
    found = worst(family, WIDE[shape], [None, 64])
    assert max(found.values()) <= EXACT, found


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_forks_at_every_offset_of_a_block(family: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row has a tree for every offset. size: of the blocks of scans, None for what they choose."""
    if size is not None:
        for scan in (delta_rule, state_space):
            monkeypatch.setattr(scan, "_block_size", lambda *_: size)
    longest = 66 if size is None else size + 2
    row = [[trees.FIRST_TOKEN + offset, *branch] for offset in range(1, longest) for branch in fork_at(offset)]
    found = worst(family, row, [None, 64])
    assert max(found.values()) <= EXACT, found


def test_forks_around_the_end_of_a_block() -> None:
    """And of a chunk of the model's own scan: 64 tokens."""
    row = [[trees.FIRST_TOKEN + offset, *branch] for offset in (15, 16, 17, 63, 64, 65) for branch in fork_at(offset)]
    found = worst("qwen3_5_text", row, [None])
    assert max(found.values()) <= EXACT, found


@settings(max_examples=4)
@given(sequence_batches(), st.sampled_from(BUDGETS))
def test_random_trees(sequences: Sequences, budget: int | None) -> None:
    _check_random(["lfm2"], sequences, budget)


@pytest.mark.slow
@settings(max_examples=40)
@given(sequence_batches(max_length=30), st.sampled_from(BUDGETS))
def test_more_random_trees(sequences: Sequences, budget: int | None) -> None:
    _check_random(FAMILIES, sequences, budget)


def _check_random(families: Sequence[str], sequences: Sequences, budget: int | None) -> None:
    for family in families:
        found = worst(family, sequences, [budget])
        assert max(found.values()) <= EXACT, (family, found)


@pytest.mark.parametrize(
    "fault,budget",
    [
        (faults.begin_with_a_siblings_state, None),
        (faults.begin_with_a_siblings_state, 64),
        (faults.convolve_across_forks, None),
        (faults.read_the_latest_state, 7),
    ],
)
@pytest.mark.parametrize("family", SMOKE)
def test_wrong_states_are_noticed(
    fault: faults.Fault, budget: int | None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [[*run(9), 5, *run(3)], [*run(9), 6, *run(3)], [*run(9)[:5], 7, *run(4)], run(9)]
    fault(monkeypatch)
    assert worst(family, sequences, [budget])[budget] > NOTICED


@pytest.mark.parametrize(
    "fault,budget", [(faults.drop_state_gradient_of_one_child, None), (faults.drop_state_gradient_of_later_chunks, 7)]
)
@pytest.mark.parametrize("family", [family for family in SMOKE if family != "lfm2"])
def test_a_dropped_gradient_of_a_state_is_noticed(
    fault: faults.Fault, budget: int | None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [[*run(9), 5 + child, *run(9, seed=child)] for child in range(3)]
    with widened():
        expected = dense(model_of(family), sequences)
        fault(monkeypatch)
        found = difference(along(model_of(family), sequences, budget), expected)
    assert found.logprobs <= EXACT and found.gradients > NOTICED, found


@pytest.mark.usefixtures("node_after_node")
@pytest.mark.parametrize("family,sequences", [("jamba", trees.star(2)), ("zamba2", trees.star(2, branch=1))])
def test_what_cannot_run_node_after_node(family: str, sequences: Sequences) -> None:
    """A scan that takes no state, and a one-token kernel without the bound on step lengths: functions are right."""
    assert worst(family, sequences, [1 if family == "zamba2" else None]).popitem()[1] > NOTICED
