"""Faults of recurrent layers on trees, each of which every comparison must notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from dta_plugin.execution.streaming.state_arena import StateArena
from dta_plugin.recurrent import convolution
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.states import Key

Fault = Callable[[pytest.MonkeyPatch], None]


def begin_with_a_siblings_state(patch: pytest.MonkeyPatch) -> None:
    """The last child of the last fork goes on from where the branch beside it ends."""
    right = StatePlan.from_depth

    def wrong(depth: np.ndarray, leaves: Sequence[int] | np.ndarray = ()) -> StatePlan:
        plan = right(depth, leaves)
        later = np.flatnonzero((plan.parent >= 0) & (plan.parent != np.arange(-1, len(plan) - 1)))
        plan.parent[later[-1:]] = later[-1:] - 1
        return plan

    patch.setattr(StatePlan, "from_depth", wrong)


def convolve_across_forks(patch: pytest.MonkeyPatch) -> None:
    """Convolutions, and nothing else, take the row for one sequence."""
    near = convolution._near

    def along(plan: StatePlan, width: int, device: torch.device) -> convolution._Near:
        return near(StatePlan(np.arange(-1, len(plan) - 1), plan.leaves), width, device)

    patch.setattr(convolution, "_near", along)


def drop_state_gradient_of_one_child(patch: pytest.MonkeyPatch) -> None:
    """Of the children of a fork within a row, the first alone gives its parent's state a gradient; values are right."""
    add = torch.Tensor.index_add_

    def first_alone(total: torch.Tensor, dim: int, index: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if dim == 0 and total.ndim > 2:  # states
            targets = index.tolist()
            first = [place for place, target in enumerate(targets) if target not in targets[:place]]
            index, part = index[first], part[first]
        return add(total, dim, index, part)

    patch.setattr(torch.Tensor, "index_add_", first_alone)


def drop_state_gradient_of_later_chunks(patch: pytest.MonkeyPatch) -> None:
    """Of the chunks that begin with one state, the first that comes alone gives it a gradient; values are right."""
    add = StateArena.add_gradient

    def first_alone(arena: StateArena, key: Key, depth: int, gradient: torch.Tensor) -> None:
        if (key, depth) not in arena._gradients:
            add(arena, key, depth, gradient)

    patch.setattr(StateArena, "add_gradient", first_alone)


def read_the_latest_state(patch: pytest.MonkeyPatch) -> None:
    """A chunk begins with the state that was left last, on whatever branch."""

    def latest(arena: StateArena, key: Key, depth: int) -> torch.Tensor:
        return next(state for (owner, _), state in reversed(arena._states.items()) if owner == key)

    patch.setattr(StateArena, "read", latest)
