"""Which rows of a mini-batch form its micro-batches, so that siblings meet and every rank makes equally many.

With `use_dynamic_bsz`, micro-batches are filled with *tree* tokens up to `max_token_len_per_gpu`. Otherwise verl's
number of rows per micro-batch stays. verl restores the order of rows in what comes back.

In an update rows move only where that changes no gradient: where micro-batch losses are sums over rows and tokens,
normalised by the mini-batch. Losses that look at a whole micro-batch keep verl's own micro-batches (`regroup="auto"`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensordict import TensorDict
from torch import distributed
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.losses import update_traits
from dta_plugin.training.placement.micro_batches import BudgetPlanner, SizePlanner
from dta_plugin.training.placement.ranks import Bins
from dta_plugin.tree.cost import ModelCost

_PLAN = "dta_micro_batches"


def may_regroup(data: TensorDict, regroup: str, loss_function: Any, forward_only: bool) -> bool:
    """Whether rows may go to other micro-batches than verl's."""
    if regroup == "never" or tu.get_non_tensor_data(data, "force_group_size", 1) != 1:
        return False
    return forward_only or regroup == "always" or update_traits(loss_function, data).allows_moves


def planner(data: TensorDict, sequences: Sequence[np.ndarray], cost: ModelCost) -> BudgetPlanner | SizePlanner:
    """Of a mini-batch on this rank, as verl's settings in it say."""
    if tu.get_non_tensor_data(data, "use_dynamic_bsz", True):
        return BudgetPlanner(sequences, int(tu.get_non_tensor_data(data, "max_token_len_per_gpu", None)))
    return SizePlanner(sequences, int(tu.get_non_tensor_data(data, "micro_batch_size_per_gpu", None)), cost)


def agreed(value: Any, group: Any) -> list[Any]:
    """The value of every rank of the data-parallel group. All of them must call it."""
    values = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group)
    return values


def set_plan(data: TensorDict, plan: Bins | None) -> None:
    """Have `as_planned` cut `data` so; None: as verl does, which says what is wrong if it cannot."""
    if plan is not None:
        tu.assign_non_tensor_data(data, _PLAN, _Plan(plan, tu.get_non_tensor_data(data, "use_dynamic_bsz", True)))


def clear_plan(data: TensorDict) -> None:
    """As `data` was before `set_plan`."""
    plan = tu.get_non_tensor_data(data, _PLAN, None)
    if plan is not None:
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", plan.was_dynamic)
        del data[_PLAN]


class _Plan:
    """A plan on its way through a TensorDict, which would take a list apart."""

    def __init__(self, bins: Bins, was_dynamic: bool) -> None:
        self.bins, self.was_dynamic = bins, was_dynamic


def as_planned(prepare_micro_batches: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `prepare_micro_batches`, which follows the plan of a mini-batch that has one."""

    @functools.wraps(prepare_micro_batches)
    def wrapped(data: TensorDict, *args: Any, **kwargs: Any) -> Any:
        plan = tu.get_non_tensor_data(data, _PLAN, None)
        if plan is None:
            return prepare_micro_batches(data, *args, **kwargs)
        micro_batches = [tu.index_select_tensor_dict(data, indices) for indices in plan.bins]
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", True)  # verl then restores the order of rows
        return micro_batches, plan.bins

    return wrapped
