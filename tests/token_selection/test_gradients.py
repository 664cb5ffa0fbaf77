"""Token selection through a real model: the mean gradient over all drawings is the gradient of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dta_plugin.token_selection.select import SCHEMES, TokenSelection
from tests.support.models import tiny_model
from tests.support.nat import drawings
from tests.support.trees import run

CUTS = ("rpc", "rpc-uniform", "rpc-two-point")
PROMPT = 4
TOKENS = 6
ROW = run(PROMPT + TOKENS, seed=5)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("qwen3", torch.float64)


def logprobs(model: torch.nn.Module, tokens: int, first: int = 0) -> torch.Tensor:
    """Of the first so many completion tokens; nothing behind them runs, nor what is before `first`."""
    row = torch.tensor([ROW[first : PROMPT + tokens]])
    logits = model(row).logits[0, PROMPT - first - 1 : -1]
    return logits.log_softmax(-1).gather(1, row[0, PROMPT - first :, None])[:, 0]


def gradient(model: torch.nn.Module, weights: np.ndarray) -> torch.Tensor:
    """Of the weighted sum of clipped ratios and KL terms, over TOKENS; weights: float64 [tokens that run]."""
    new = logprobs(model, len(weights))
    old = new.detach() + 0.5 * torch.sin(torch.arange(len(weights), dtype=torch.float64))
    ratio, to_reference = (new - old).exp(), old - 0.3 - new
    terms = torch.minimum(1.5 * ratio, 1.5 * ratio.clamp(0.8, 1.2)) - 0.05 * (to_reference.exp() - 1 - to_reference)
    loss = terms @ torch.from_numpy(weights) / TOKENS
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def distance(model: torch.nn.Module, selection: TokenSelection, weigh: Callable[[np.ndarray], np.ndarray]) -> float:
    """Of the mean gradient over all drawings, as `weigh` changes their weights, to that of all tokens: relative."""
    full = gradient(model, np.ones(TOKENS))
    mean = torch.zeros_like(full)
    for drawing, probability in drawings(selection, np.ones((1, TOKENS), dtype=bool)):
        weights = drawing.weights[0]
        if selection.cuts:
            weights = np.trim_zeros(weights, "b")
        mean += probability * gradient(model, weigh(weights))
    return float((mean - full).norm() / full.norm())


def test_a_prefix_runs_as_within_the_whole_row(model: torch.nn.Module) -> None:
    """A row without its first token, the negative control, does not."""
    with torch.no_grad():
        whole = logprobs(model, TOKENS)
        for tokens in range(1, TOKENS + 1):
            torch.testing.assert_close(logprobs(model, tokens), whole[:tokens], rtol=1e-12, atol=1e-12)
            assert (logprobs(model, tokens, first=1) - whole[:tokens]).abs().min() > 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("min_prefix", [1, 4, TOKENS])
def test_the_mean_gradient_is_that_of_all_tokens(model: torch.nn.Module, scheme: str, min_prefix: int) -> None:
    """Cut rows run as far as they are cut, rows of single tokens whole."""
    selection = TokenSelection(scheme=scheme, min_prefix=min_prefix)
    assert distance(model, selection, lambda weights: weights) < 1e-10


@pytest.mark.parametrize("scheme", CUTS)
def test_the_mean_gradient_is_not_that_with_other_denominators(model: torch.nn.Module, scheme: str) -> None:
    """Weights that sum to the row's length, the mean of what is kept, and half the row always."""
    selection = TokenSelection(scheme=scheme)
    assert distance(model, selection, lambda weights: TOKENS * weights / weights.sum()) > 0.1
    assert distance(model, selection, lambda weights: np.full(len(weights), TOKENS / len(weights))) > 0.1
    assert distance(model, selection, lambda weights: np.full(TOKENS // 2, 2.0)) > 0.1
