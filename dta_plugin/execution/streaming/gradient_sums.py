"""Sums of gradients over several backward passes: in float32 or wider, and never more than one parameter's aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dta_plugin.dtypes import accumulation_dtype


class GradientSums:
    """Per parameter name, the sum of its gradients over all chunks; without those that got none."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(
        self, outputs: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Run `outputs` backward from `seeds` and add the gradients of `parameters`, each as soon as it is known.

        torch 2.8 forgets the hooks of a parameter that was saved under checkpointing: what no hook has taken is
        added in the end.
        """
        taken: set[str] = set()

        def take(name: str, gradient: torch.Tensor) -> torch.Tensor:
            self._add(name, gradient)
            taken.add(name)
            return gradient.new_zeros(()).expand_as(gradient)  # in place of it: zeros that take no memory

        pairs = [(x, seed) for x, seed in zip(outputs, seeds, strict=True) if x.requires_grad]
        if not pairs:  # nothing below is trained
            return
        hooks = [parameter.register_hook(partial(take, name)) for name, parameter in parameters.items()]
        try:
            roots, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(roots, list(parameters.values()), gradients, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None and name not in taken:
                self._add(name, gradient)

    def complete(
        self, outputs: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Run `outputs` backward as `Tensor.backward` does, with all sums as part of the gradients that it finds."""
        torch.autograd.backward(_Completed.apply(self, parameters, *outputs, *parameters.values()), list(seeds))

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient.to(accumulation_dtype(gradient.dtype), copy=True)

    def hand_out(self, parameters: Mapping[str, torch.Tensor]) -> Iterable[torch.Tensor | None]:
        """The sums, in the dtype of the parameters and in their order; each is given up as it is handed out."""
        for name, parameter in parameters.items():
            total = self._sums.pop(name, None)
            yield None if total is None else total.to(parameter.dtype)


class _Completed(torch.autograd.Function):
    """Outputs as they are; in the backward pass, the sums for the parameters."""

    @staticmethod
    def forward(ctx: Any, sums: GradientSums, parameters: Mapping[str, torch.Tensor], *tensors: torch.Tensor):
        ctx.sums, ctx.parameters = sums, parameters
        return tuple(x.view_as(x) for x in tensors[: len(tensors) - len(parameters)])

    @staticmethod
    def backward(ctx: Any, *gradients):
        return None, None, *gradients, *ctx.sums.hand_out(ctx.parameters)
