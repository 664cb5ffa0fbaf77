"""A temperature per sequence: shared hidden states, log-probs of their own; packed, streamed and dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

import dta_plugin
from dta_plugin import PrefixTree, TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.layout import ScoredEdges
from tests.support.models import tiny_model
from tests.support.oracle import Result, difference, functional, result_of
from tests.support.trees import SHAPES

CONFIGS = {
    "packed": TreeConfig(executor="packed"),
    "streamed": TreeConfig(executor="streamed", max_tree_tokens_per_chunk=12),
}


def _temperatures(count: int) -> list[float]:
    return [(0.5, 1.0, 1.5)[i % 3] for i in range(count)]


def _dense(model: torch.nn.Module, sequences: Sequence[Sequence[int]], temperatures: Sequence[float]) -> Result:
    logprobs, entropies = [], []
    for sequence, temperature in zip(sequences, temperatures, strict=True):
        ids = torch.tensor(sequence)
        log_p = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        logprobs.append(log_p.gather(1, ids[1:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return result_of(model, logprobs, entropies, functional)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # the second has soft-caps
@pytest.mark.parametrize("shape", ["branching_comb", "duplicates", "star_33", "one_token_branches"])
@pytest.mark.parametrize("how", CONFIGS)
def test_equals_dense(how: str, shape: str, family: str) -> None:
    model = tiny_model(family, torch.float64)
    sequences = SHAPES[shape]
    temperatures = _temperatures(len(sequences))
    out = dta_plugin.sequence_logprobs(model, sequences, CONFIGS[how], temperatures, return_entropy=True)
    assert out.entropies is not None
    actual = result_of(model, out.logprobs, out.entropies, functional)
    expected = _dense(tiny_model(family, torch.float64), sequences, temperatures)
    assert difference(actual, expected).worst < 1e-6


def test_fallback_and_verification_know_them() -> None:
    model = tiny_model("qwen3")
    sequences = SHAPES["branching_comb"]
    temperatures = _temperatures(len(sequences))
    tree = dta_plugin.sequence_logprobs(model, sequences, TreeConfig(verify="first"), temperatures)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1e-9
    dense = dta_plugin.sequence_logprobs(model, sequences, TreeConfig(on_unsupported="dense"), temperatures)
    assert dense.report.executor == "dense"
    torch.testing.assert_close(torch.cat(tree.logprobs), torch.cat(dense.logprobs), rtol=1e-4, atol=1e-5)


def test_one_value_costs_nothing() -> None:
    tree = PrefixTree.from_sequences(SHAPES["branching_comb"])
    alike = ScoredEdges.from_tree(tree, None, temperatures=[0.7] * tree.num_sequences)
    plain = ScoredEdges.from_tree(tree, None)
    assert torch.equal(alike.target, plain.target) and torch.equal(alike.rows, plain.rows)
    assert torch.equal(alike.edge_of_token, plain.edge_of_token)


@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [math.nan, 1.0]])
def test_wrong_ones_raise(temperatures: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="Expected a finite"):
        dta_plugin.sequence_logprobs(tiny_model("qwen3"), [[3, 4], [3, 5]], temperature=temperatures)
