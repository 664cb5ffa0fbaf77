"""Which rows of a mini-batch form its micro-batches, so that siblings meet and every rank makes equally many.

With `use_dynamic_bsz`, micro-batches are filled with *tree* tokens up to `max_token_len_per_gpu`: groups stay whole,
and one that is larger is cut along its tree. Otherwise verl's number of rows per micro-batch stays. verl restores the
order of rows in what comes back.

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
from verl.workers.utils.losses import ppo_loss, sft_loss

from dta_plugin.balance import pack, partition
from dta_plugin.tree.cost import ModelCost

Plan = list[list[int]]
_PLAN = "dta_micro_batches"
# Registered policy losses that sum over rows and tokens. Others look at a whole micro-batch: clip_cov and kl_cov rank
# its tokens, geo_mean averages its rows, bypass_mode may normalise weights over it.
ADDITIVE = {"vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "dro", "cispo"}


def may_regroup(data: TensorDict, regroup: str, loss_function: Any, forward_only: bool) -> bool:
    """Whether rows may go to other micro-batches than verl's."""
    if regroup == "never" or tu.get_non_tensor_data(data, "force_group_size", 1) != 1:
        return False
    return forward_only or regroup == "always" or is_additive(loss_function, data)


def is_additive(loss_function: Any, data: TensorDict) -> bool:
    """Whether the losses of micro-batches add up to the same whatever rows they have."""
    if getattr(loss_function, "func", loss_function) is sft_loss:
        return True
    config = ppo_config(loss_function)
    if config is None:
        return False
    if tu.get_non_tensor_data(data, "global_batch_size", None) is None:  # then a micro-batch counts its own rows
        return False
    if config.loss_agg_mode == "seq-mean-token-sum-norm" and config.loss_scale_factor is None:  # its longest row counts
        return False
    return config.policy_loss.get("loss_mode", "vanilla") in ADDITIVE


def ppo_config(loss_function: Any) -> Any:
    """The actor's config in verl's own PPO loss; None for another loss."""
    is_ppo = getattr(loss_function, "func", loss_function) is ppo_loss
    return getattr(loss_function, "keywords", {}).get("config") if is_ppo else None


class Planner:
    """Micro-batches of one mini-batch on this rank; `count` of them, of which there may be more on other ranks."""

    def __init__(self, data: TensorDict, sequences: Sequence[np.ndarray], model: ModelCost) -> None:
        self.sequences, self.model = sequences, model
        self.is_dynamic = bool(tu.get_non_tensor_data(data, "use_dynamic_bsz", True))
        if self.is_dynamic:
            self.budget = int(tu.get_non_tensor_data(data, "max_token_len_per_gpu", None))
            self.count = len(pack(sequences, self.budget).bins)
        else:
            self.size = int(tu.get_non_tensor_data(data, "micro_batch_size_per_gpu", None))
            self.count = -(-len(sequences) // self.size)

    def plan(self, count: int) -> Plan | None:
        """`count` micro-batches, the costliest first, as lists of rows; None where verl's own have to do."""
        if count > len(self.sequences):
            return None
        if self.is_dynamic:
            dealt = pack(self.sequences, self.budget, at_least=count)
        elif len(self.sequences) % self.size or count != self.count:
            return None  # verl says what is wrong
        else:
            dealt = partition(self.sequences, count, model=self.model, sizes=[self.size] * count)
        order = np.argsort([-load for load in dealt.loads], kind="stable")
        return [dealt.bins[index] for index in order]


def agreed(value: Any, group: Any) -> list[Any]:
    """The value of every rank of the data-parallel group. All of them must call it."""
    values = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group)
    return values


def set_plan(data: TensorDict, plan: Plan | None) -> None:
    """Have `as_planned` cut `data` so."""
    if plan is not None:
        tu.assign_non_tensor_data(data, _PLAN, _Rows(plan, tu.get_non_tensor_data(data, "use_dynamic_bsz", True)))


def clear_plan(data: TensorDict) -> None:
    """As `data` was before `set_plan`."""
    rows = tu.get_non_tensor_data(data, _PLAN, None)
    if rows is not None:
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", rows.was_dynamic)
        del data[_PLAN]


class _Rows:
    """A plan on its way through a TensorDict, which would take a list apart."""

    def __init__(self, plan: Plan, was_dynamic: bool) -> None:
        self.plan, self.was_dynamic = plan, was_dynamic


def as_planned(prepare_micro_batches: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `prepare_micro_batches`, which follows the plan of a mini-batch that has one."""

    @functools.wraps(prepare_micro_batches)
    def wrapped(data: TensorDict, *args: Any, **kwargs: Any) -> Any:
        rows = tu.get_non_tensor_data(data, _PLAN, None)
        if rows is None:
            return prepare_micro_batches(data, *args, **kwargs)
        micro_batches = [tu.index_select_tensor_dict(data, indices) for indices in rows.plan]
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", True)  # verl then restores the order of rows
        return micro_batches, rows.plan

    return wrapped
