"""By which way a delta rule runs along a row: torch's functions, or FLA's kernels by levels or by paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dta_plugin.recurrent.delta_rule import tree_gated_delta_rule, tree_kda
from dta_plugin.recurrent.fla import GATED_DELTA_RULE, KDA, Kernel
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.recurrent.varlen import Inputs, by_levels, by_paths

# (inputs, plan, the state that comes in, use_qk_l2norm_in_kernel) -> results of `tree_gated_delta_rule`
Run = Callable[[Inputs, StatePlan, torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor]]

TORCH_OPERATIONS = {GATED_DELTA_RULE: tree_gated_delta_rule, KDA: tree_kda}

TORCH_SCAN, FLA_LEVELS, FLA_RESCAN = "torch scan", "fla levels", "fla rescan"

# What one more level costs a layer, in tokens computed again: its call, which is about 10 ms of host time forward and
# backward as others have published it, against what a kernel computes meanwhile. Not measured by us.
LEVEL_TOKENS = 65_536
# A rescan repeats at most so many tokens for each of the row: what it repeats lives in one layer at a time.
LARGEST_RESCAN = 4


@dataclass(frozen=True, slots=True)
class Way:
    """name: for the report."""

    name: str
    run: Run


def delta_rule_way(name: str, kernel: Kernel | None, plan: StatePlan) -> Way:
    """name: FLA's of the rule. kernel: FLA's function, None where it does not serve."""
    if kernel is None:
        return Way(TORCH_SCAN, lambda inputs, *rest: TORCH_OPERATIONS[name](*inputs, *rest))
    if is_rescan_cheaper(plan):
        return Way(FLA_RESCAN, partial(by_paths, kernel))
    return Way(FLA_LEVELS, partial(by_levels, kernel))


def is_rescan_cheaper(plan: StatePlan) -> bool:
    """Whether the calls that levels take beyond the first cost more than the tokens that paths repeat."""
    further_calls, tokens = len(plan.nodes().levels) - 1, plan.path_tokens()
    return tokens - len(plan) < further_calls * LEVEL_TOKENS and tokens <= LARGEST_RESCAN * len(plan)
