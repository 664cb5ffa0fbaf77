"""Compare the tree with the dense path on a user's own model and batch: log-probs, and gradients of every parameter.

Both passes run in evaluation mode, so that dropout cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dta_plugin.config import TreeConfig
from dta_plugin.execution.auto import run_dense, run_tree
from dta_plugin.execution.batch import Batch, SequenceLogProbs, prepare
from dta_plugin.execution.model import causal_lm
from dta_plugin.tree.layout import Scored
from dta_plugin.tree.trie import TokenSequence

# Largest mean |difference| of log-probs, in nats, that rounding explains; a wrong mask gives 0.1 and more.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class VerificationError(AssertionError):
    """The tree and the dense path differ by more than rounding explains."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Tree against dense. logprob_max, logprob_mean: nats. gradients: parameter name -> relative error (L2)."""

    logprob_max: float
    logprob_mean: float
    gradients: dict[str, float]

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter that differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("none", 0.0))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_logprobs(model: nn.Module, batch: Batch, config: TreeConfig, temperature: float = 1.0) -> float:
    """Run a prepared batch both ways. Returns the mean |difference| of log-probs in nats.

    Raises VerificationError where it is more than rounding explains for the model's dtype.
    """
    with _evaluation_mode(model):
        tree = run_tree(model, batch, config, temperature=temperature)
        dense = run_dense(model, batch, temperature=temperature)
    worst, mean = _logprob_difference(tree, dense)
    dtype = _compute_dtype(model)
    if not mean <= _TOLERANCE[dtype]:
        raise VerificationError(
            f"Tree and dense log-probs differ by {mean:.2e} nats on average (at most {worst:.2e}); rounding in {dtype} "
            f"explains {_TOLERANCE[dtype]:.0e}. Please report the model ({type(causal_lm(model)).__name__}) with the "
            "output of `dta doctor`; until then run without the tree."
        )
    return mean


def compare(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    scored: Scored | None = None,
    config: TreeConfig | None = None,
    temperature: float = 1.0,
) -> Difference:
    """Log-probs and gradients of a seeded random linear functional of them, tree against dense.

    Leaves the parameters' `.grad` as it was. Raises as `sequence_logprobs` does.
    """
    config = config or TreeConfig()
    batch = prepare(model, sequences, scored, config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _evaluation_mode(model):
        dense = run_dense(model, batch, temperature=temperature)
        dense_gradients = _gradients(dense, parameters)
        tree = run_tree(model, batch, config, temperature=temperature)
        tree_gradients = _gradients(tree, parameters)
    worst, mean = _logprob_difference(tree, dense)
    scale = max((g.norm().item() for g in dense_gradients.values()), default=0.0)
    gradients = {
        name: _relative(tree_gradients[name], expected, floor=1e-3 * scale)
        for name, expected in dense_gradients.items()
    }
    return Difference(worst, mean, gradients)


def _gradients(result: SequenceLogProbs, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat(result.logprobs)
    weights = torch.randn(flat.shape, generator=generator).to(flat)
    gradients = torch.autograd.grad((flat * weights).sum(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _relative(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """|actual - expected| / |expected|; `floor` keeps parameters without a gradient worth the name from dominating."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), floor, torch.finfo(torch.float64).tiny)


def _logprob_difference(tree: SequenceLogProbs, dense: SequenceLogProbs) -> tuple[float, float]:
    if not tree.logprobs:  # on a rank without sequences
        return 0.0, 0.0
    difference = (torch.cat(tree.logprobs) - torch.cat(dense.logprobs)).abs()
    return (difference.max().item(), difference.mean().item()) if difference.numel() else (0.0, 0.0)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    base = causal_lm(model)
    kind = base.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
