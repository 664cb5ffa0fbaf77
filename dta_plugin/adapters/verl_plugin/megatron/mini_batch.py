"""What a Megatron rank finds in its part of a mini-batch, and how many micro-batches its pipeline takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from tensordict import TensorDict
from torch.distributed import ProcessGroup

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, may_regroup, planner
from dta_plugin.adapters.verl_plugin.mini_batch import Decision, Findings
from dta_plugin.adapters.verl_plugin.obstacles import text_obstacle
from dta_plugin.adapters.verl_plugin.tokens import selection_obstacle
from dta_plugin.config import TreeConfig
from dta_plugin.training.placement.micro_batches import BudgetPlanner, SizePlanner
from dta_plugin.tree.cost import CostEstimate, ModelCost, estimate
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree


def find(
    obstacle: str | None,
    cost: ModelCost | None,
    data: TensorDict,
    config: TreeConfig,
    loss_function: Any,
    forward_only: bool,
    key: str,
) -> tuple[Findings, BudgetPlanner | SizePlanner | None]:
    """Look at a mini-batch whose tokens have been chosen; with what plans its micro-batches, if anything may.

    obstacle: of the engine, without which it knows its cost. key: where the command has the options.
    """
    invalid = None if forward_only else selection_obstacle(data, loss_function, config, key)
    obstacle = obstacle or text_obstacle(data)
    if invalid is not None or obstacle is not None or cost is None:
        return Findings(invalid, obstacle, None, len(data)), None
    rows, plans = JaggedRows.from_data(data, None), None
    if may_regroup(data, config.regroup, loss_function, forward_only):
        plans = planner(data, rows.runs.sequences, cost)
    count = None if plans is None else plans.count
    return Findings(None, None, count, len(data), rows.read is not None), plans


def for_the_pipeline(decision: Decision, ranks: Sequence[Findings], multiple: int) -> int | None:
    """How many micro-batches every rank makes: a multiple of what virtual stages ask for; None for verl's own."""
    if decision.micro_batches is None:
        return None
    count = -(-decision.micro_batches // multiple) * multiple
    return count if count <= min(rank.rows for rank in ranks) else None


def virtual_stages_multiple(config: Any) -> int:
    """Of what verl makes the number of micro-batches a multiple. config: Megatron's TransformerConfig."""
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return config.microbatch_group_size_per_vp_stage if stages is not None and stages > 1 else 1


def tree_cost(cost: ModelCost, tree: PrefixTree, edges: ScoredEdges) -> CostEstimate:
    """Of a micro-batch, dense and as a tree."""
    return estimate(tree, cost, edges.host.scored_tokens, len(edges.rows))


def cost_on_all_ranks(cost: ModelCost, data: TensorDict, group: ProcessGroup) -> CostEstimate:
    """In FLOPs: of verl's own path, which computes all tokens, and of trees of those that are to run."""

    def cost_of(rows: JaggedRows) -> CostEstimate:
        tree = PrefixTree.from_sequences(rows.runs.sequences)
        return tree_cost(cost, tree, ScoredEdges.from_tree(tree, rows.runs.scored))

    dense, tree = cost_of(JaggedRows.whole(data)).dense, cost_of(JaggedRows.from_data(data, None)).tree
    ranks = agreed((dense, tree), group)
    return CostEstimate(sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks))
