"""What states come in before a row and leave it: none where a row has whole sequences, or those of a tree in pieces."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

import torch

# A state of a layer: the module that has it, which of its states, and which call of the module in a pass.
Key = Hashable


class States(Protocol):
    """Between the rows of one tree. Of batch 1, in whatever shape and dtype a layer's state has."""

    def enter(self, key: Key, inputs: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """-> the state that comes in before the row, differentiable; None at the start of sequences.

        inputs: what the layer computes from beside it. Only what depends on trained parameters is differentiated.
        """

    def leave(self, key: Key, out: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Hand on the states [K, ...] behind the plan's leaves.

        out: what the layer computes from the same graph. -> the same, in whose backward pass the gradients of the
        states take part.
        """


class OwnStates:
    """The row has whole sequences."""

    def enter(self, key: Key, inputs: Iterable[torch.Tensor]) -> torch.Tensor | None:
        return None

    def leave(self, key: Key, out: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return out
