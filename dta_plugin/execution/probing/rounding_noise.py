"""What rounding explains of a difference from a model's own path: measured on the batch itself, not assumed.

The same rows run through the model's own path once more, with every input embedding moved by up to half a rounding
step. That draws all later rounding anew, so the difference between the two runs is what rounding does to this model,
these rows and this precision. (Padding the rows differently would not do: on many devices it changes no bit.)

Measured on tiny random models, the tree differs from the dense path by 0.4 to 1.3 times as much, mean or maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention.precision import allows_tf32
from dta_plugin.dtypes import compute_dtype
from dta_plugin.models.recurrent_layers import mixers

# Times the noise: what a mean, or a largest value, of as many tokens may be.
_MEAN, _MOST = 3.0, 3.0
# Share of tokens whose largest values do not count where routers choose experts: rounding may choose another one.
_REROUTED = 0.1
# Looks at the noise: where few values show it, where rounding reroutes tokens, and where states carry it on and make
# more of it in single tokens, each look finds others.
_FEW, _LOOKS = 64, 4
# A parameter of fewer numbers (a decay per head) may have a noise that is small by chance.
_FEW_NUMBERS = 8
_HALF_PRECISION = 1e-4


@dataclass(frozen=True, slots=True)
class Gap:
    """Absolute differences of as many values: their mean and the largest, both 0 of none."""

    mean: float
    most: float

    @classmethod
    def from_differences(cls, differences: torch.Tensor, is_routed: bool = False) -> Gap:
        """differences: any shape. is_routed: of a model with experts, whose outliers among tokens do not count."""
        values = differences.detach().abs().flatten().float()
        if not values.numel():
            return cls(0.0, 0.0)
        if not torch.isfinite(values).all():
            return cls(float("nan"), float("nan"))
        kept = values.numel() - int(_REROUTED * values.numel()) if is_routed else values.numel()
        return cls(values.mean().item(), values.sort().values[kept - 1].item())

    @classmethod
    def largest(cls, gaps: Sequence[Gap]) -> Gap:
        """The most that any of several looks has shown."""
        return cls(max(gap.mean for gap in gaps), max(gap.most for gap in gaps))

    def is_within(self, noise: Gap, floor: float) -> bool:
        """Whether rounding explains it. floor: what it explains anyway."""
        return self.mean <= _MEAN * noise.mean + floor and self.most <= _MOST * max(noise.most, noise.mean) + floor


def rounding_unit(model: PreTrainedModel) -> float:
    """Relative size of a rounding step in what the model computes in now, at least float32's: norms compute in that."""
    kind = model.device.type
    dtype = compute_dtype(kind, model.dtype)
    if kind == "cuda" and dtype == torch.float32 and allows_tf32():
        dtype = torch.float16  # which has as many bits
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def is_routed(model: PreTrainedModel) -> bool:
    """Whether tokens choose experts, by what transformers calls the modules."""
    return any(name.endswith((".experts", ".router")) for name, _ in model.named_modules())


def logprob_floor(logprobs: torch.Tensor, unit: float) -> float:
    """What rounding explains of log-probs anyway, in nats: some float32 steps of the largest one.

    unit: of `rounding_unit`. Where logits are small, moving the embeddings may change no bit of them.
    """
    largest = logprobs.detach().abs().max().item() if logprobs.numel() else 0.0
    return unit + 8 * torch.finfo(torch.float32).eps * largest


def noise_seeds(model: PreTrainedModel, values: int, numbers: int = _FEW_NUMBERS) -> range:
    """Seeds for `perturbed_embeddings`: how often to look at the noise of so many values.

    numbers: of the smallest parameter whose gradient is looked at.
    """
    is_shifty = is_routed(model) and rounding_unit(model) > _HALF_PRECISION
    is_recurrent = bool(mixers(model))
    return range(_LOOKS if is_shifty or is_recurrent or values < _FEW or numbers < _FEW_NUMBERS else 1)


def half_steps(unit: float, seed: int) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    """A forward hook that moves every number of a module's output by up to half a rounding step, drawn by `seed`.

    unit: relative size of a step.
    """
    random = torch.Generator("cpu").manual_seed(seed)

    def move(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        steps = torch.rand(output.shape, generator=random, dtype=torch.float32, device="cpu") - 0.5
        size = max(unit, torch.finfo(output.dtype).eps)  # mixed precision may hand them out in a narrower type
        return output * (1 + size * steps).to(output)

    return move


@contextmanager
def perturbed_embeddings(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Within the context, every number of an input embedding is off by up to half a rounding step, drawn by `seed`."""
    handle = model.get_input_embeddings().register_forward_hook(half_steps(rounding_unit(model), seed))
    try:
        yield
    finally:
        handle.remove()
