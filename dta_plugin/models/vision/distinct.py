"""Which images of a batch are the same: by a sample of their numbers first, then by all of them.

Siblings carry a copy of their prompt's image each. A few numbers of each, brought to the CPU at once, tell different
images apart; those that agree in them are compared in full, where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dta_plugin.models.vision.units import Unit

# Numbers of each tensor that go into the sample.
_SAMPLED = 64


def distinct_units(units: Sequence[Unit]) -> tuple[list[Unit], list[int]]:
    """The first unit of each kind, in order; and per unit, which of these it is the same as."""
    found: list[Unit] = []
    alike: dict[tuple[object, ...], list[int]] = {}
    kinds = []
    for unit, sample in zip(units, _samples(units), strict=True):
        candidates = alike.setdefault(sample, [])
        kind = next((index for index in candidates if _are_equal(found[index], unit)), None)
        if kind is None:
            kind = len(found)
            found.append(unit)
            candidates.append(kind)
        kinds.append(kind)
    return found, kinds


def _samples(units: Sequence[Unit]) -> list[tuple[object, ...]]:
    """Per unit, shapes and some of its numbers. One transfer for all."""
    parts = [[_spread(value) for value in unit.inputs.values()] for unit in units]
    flat = [part for own in parts for part in own]
    numbers = iter(torch.cat([part.to(flat[0].device) for part in flat]).tolist() if flat else ())
    samples = []
    for unit, own in zip(units, parts, strict=True):
        shapes = tuple((name, value.shape, value.dtype) for name, value in unit.inputs.items())
        samples.append((unit.tokens, shapes, *(next(numbers) for part in own for _ in range(len(part)))))
    return samples


def _spread(value: torch.Tensor) -> torch.Tensor:
    """Numbers from all over a tensor, float64."""
    flat = value.flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)].double()


def _are_equal(one: Unit, other: Unit) -> bool:
    pairs = ((value, other.inputs[name]) for name, value in one.inputs.items())
    return all(torch.equal(value, same.to(value.device)) for value, same in pairs)
