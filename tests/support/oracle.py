"""The oracle: the unmodified Hugging Face model, dense, one sequence at a time, differentiated by autograd.

Nothing of the package is used for it. `Result` is also what a tree run is brought into, so that both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Rows = list[torch.Tensor]
Scored = Sequence[int | Sequence[bool] | torch.Tensor]

# A parameter whose gradient is smaller than this share of the largest one is judged against that share: rounding errors
# scale with the terms that are summed, not with what is left after they cancel (biases of keys and routers). With the
# float32 tolerance of 1e-5 this allows 1e-7 of the largest gradient, which is one rounding of it in float32.
GRADIENT_FLOOR = 1e-2
# Rows whose graphs are kept at once: those of a thousand rows of a recurrent model take 25 GB.
GRAPHS = 100


@dataclass(frozen=True, slots=True)
class Result:
    """Log-probs and entropies of every sequence [len - 1], and the gradient of `functional` for every parameter."""

    logprobs: Rows
    entropies: Rows
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest absolute difference of log-probs and entropies, largest relative (L2) one of gradients, and whose."""

    logprobs: float
    entropies: float
    gradients: float
    parameter: str

    @property
    def worst(self) -> float:
        return max(self.logprobs, self.entropies, self.gradients)


def functional(logprobs: Rows, entropies: Rows, seed: int = 0) -> torch.Tensor:
    """A seeded random scalar, nonlinear per token (like a clipped ratio), per sequence, and in the entropies."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for logprob, entropy in zip(logprobs, entropies, strict=True):
        a, b, c = torch.randn(3, logprob.numel(), generator=generator, dtype=torch.float64)
        weight = torch.randn((), generator=generator, dtype=torch.float64)
        logprob, entropy = logprob.double(), entropy.double()
        mean = (b * logprob).sum() / max(logprob.numel(), 1)
        total = total + (a * torch.tanh(logprob / 4)).sum() + weight * torch.sin(mean) + (c * entropy**2).sum() / 8
    return total


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """d(loss)/d(parameter) for every parameter that wants one, by `loss.backward()`, and the model left clean."""
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return _taken(model)


def _taken(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def dense(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    scored: Scored | None = None,
    temperature: float = 1.0,
    loss: Callable[[Rows, Rows], torch.Tensor] = functional,
    more: Sequence[dict[str, torch.Tensor]] | None = None,
) -> Result:
    """What the unmodified model gives. Log-softmax in float32, in float64 for float64 models.

    Up to `GRAPHS` rows keep their graphs. More run once more, each by itself, for the backward pass.

    more: per sequence, what its forward gets beside token ids.
    """
    assert model.config._attn_implementation in ("sdpa", "eager"), "the oracle wants a model the package never touched"

    def row(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.as_tensor(sequences[index])
        inputs = {} if more is None else more[index]
        logits = model(input_ids=tokens[None], **inputs, use_cache=False).logits[0, :-1]
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)
        keep = torch.ones(len(tokens), dtype=torch.bool)
        if scored is not None:
            entry = scored[index]
            keep = torch.arange(len(tokens)) >= entry if isinstance(entry, int) else torch.as_tensor(entry)
        logprob = torch.where(keep[1:], log_p.gather(1, tokens[1:, None])[:, 0], 0.0)
        return logprob, torch.where(keep[1:], -(log_p.exp() * log_p).sum(dim=-1), 0.0)

    if len(sequences) > GRAPHS:
        return _row_by_row(model, row, len(sequences), loss)
    rows = [row(index) for index in range(len(sequences))]
    return result_of(model, [logprob for logprob, _ in rows], [entropy for _, entropy in rows], loss)


def _row_by_row(
    model: torch.nn.Module,
    row: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    count: int,
    loss: Callable[[Rows, Rows], torch.Tensor],
) -> Result:
    with torch.no_grad():
        rows = [row(index) for index in range(count)]
    leaves = [tuple(value.clone().requires_grad_() for value in pair) for pair in rows]
    loss([logprob for logprob, _ in leaves], [entropy for _, entropy in leaves]).backward()
    model.zero_grad(set_to_none=True)
    for index, pair in enumerate(leaves):
        wanted = [(value, leaf.grad) for value, leaf in zip(row(index), pair, strict=True) if leaf.grad is not None]
        torch.autograd.backward([value for value, _ in wanted], [grad for _, grad in wanted])
    return Result([logprob for logprob, _ in rows], [entropy for _, entropy in rows], _taken(model))


def result_of(
    model: torch.nn.Module, logprobs: Rows, entropies: Rows, loss: Callable[[Rows, Rows], torch.Tensor] = functional
) -> Result:
    """Bring another execution's differentiable outputs into the oracle's form."""
    return Result(_values(logprobs), _values(entropies), gradients(model, loss(logprobs, entropies)))


def difference(actual: Result, expected: Result) -> Difference:
    """How far two results are apart; NaN anywhere counts as infinitely far."""
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max((gradient.double().norm().item() for gradient in expected.gradients.values()), default=0.0)
    errors = {
        name: _relative(actual.gradients[name], gradient, GRADIENT_FLOOR * largest)
        for name, gradient in expected.gradients.items()
    }
    parameter = max(errors, key=errors.__getitem__, default="none")
    return Difference(
        _largest(actual.logprobs, expected.logprobs),
        _largest(actual.entropies, expected.entropies),
        errors.get(parameter, 0.0),
        parameter,
    )


def gradient_norm(result: Result) -> float:
    """L2 norm of the gradient of all parameters together."""
    return sum(gradient.double().square().sum().item() for gradient in result.gradients.values()) ** 0.5


def gradient_error(actual: Result, truth: Result) -> float:
    """Relative L2 error of the gradient of all parameters together: the measure for half precision."""
    apart = {name: gradient.double() - truth.gradients[name].double() for name, gradient in actual.gradients.items()}
    return gradient_norm(Result([], [], apart)) / gradient_norm(truth)


def rms(errors: Sequence[float]) -> float:
    """Root mean square."""
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def _values(rows: Rows) -> Rows:
    return [row.detach().clone() for row in rows]


def _largest(actual: Rows, expected: Rows) -> float:
    assert [row.shape for row in actual] == [row.shape for row in expected]
    apart = (torch.cat(actual).double() - torch.cat(expected).double()).abs()
    return apart.nan_to_num(nan=float("inf")).max().item() if apart.numel() else 0.0


def _relative(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    apart = (actual.double() - expected.double()).norm()
    scale = max(expected.double().norm().item(), floor)
    if scale == 0.0:
        return 0.0 if apart == 0 else float("inf")
    return (apart / scale).nan_to_num(nan=float("inf")).item()
