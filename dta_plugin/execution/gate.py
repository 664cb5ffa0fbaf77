"""The gate: whether a tree that would be exact saves enough of what would run in its place.

It goes by FLOPs, or by predicted seconds where the machine was calibrated and the dense micro-batches are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.execution.calibration_store import Calibration, calibration_of
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.ranks import gathered, is_collective
from dta_plugin.models.introspection import causal_lm, input_device, model_cost, say_guessed
from dta_plugin.models.vision.batch_images import BatchImages
from dta_plugin.models.vision.cost import tower_work
from dta_plugin.tree.cost import CostEstimate, ModelCost, Padded, estimate
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.time_model import Work
from dta_plugin.tree.trie import PrefixTree


@dataclass(frozen=True, slots=True)
class Decision:
    """Tree or dense, why, and what either costs.

    flops: forward. seconds: as predicted, None where the decision is not by time. is_gated: the tree would be exact,
    but does not save enough.
    """

    use_tree: bool
    reason: str
    flops: CostEstimate
    seconds: CostEstimate | None = None
    is_gated: bool = False


def decide(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    images: BatchImages | None,
    dense_batches: Sequence[Padded],
    config: TreeConfig,
    obstacle: str | None,
) -> Decision:
    """Decide about a tree, for ranks that are tied together by what all of them save.

    dense_batches: as for `prepare_batch`. obstacle: why the tree would not be exact, on any of these ranks.
    """
    cost, (dense_tower, tree_tower) = model_cost(causal_lm(model)), _tower_work(causal_lm(model), images)
    flops = estimate(tree, cost, edges.host.scored_tokens, len(edges.rows))
    flops += CostEstimate(dense_tower.flops, tree_tower.flops)
    if obstacle is not None:
        return Decision(False, obstacle, flops)
    speeds = calibration_of(model, config) if dense_batches else None
    if speeds is None or _streams_anywhere(model, tree.tree_tokens, config):  # what memory asks for is not timed
        return _gated(model, config.min_saving, flops)
    as_tree = cost.work(tree.tree_tokens, tree.depth, len(edges.rows))
    seconds = CostEstimate(
        _dense_seconds(speeds, cost, dense_batches) + speeds.dense.seconds(dense_tower),
        speeds.tree.seconds(as_tree) + speeds.tree.seconds(tree_tower),
    )
    return _gated(model, config.min_saving, flops, seconds)


def saving_obstacle(
    model: nn.Module, longest: int, scored: int, dense_batches: Sequence[Padded], config: TreeConfig
) -> str | None:
    """Why no tree can pay, whatever is shared: that of the longest row alone is predicted to take longer than dense.

    longest, scored: the most tokens, and scored tokens, of any row. dense_batches: as for `prepare_batch`. Spares small
    batches the making of the tree.
    """
    speeds = None if is_collective(model) else calibration_of(model, config)  # ranks decide by all of their batches
    if speeds is None:
        return None
    cost = model_cost(causal_lm(model))
    dense = _dense_seconds(speeds, cost, dense_batches)
    tree = speeds.tree.seconds(cost.work(longest, np.arange(longest), scored))
    if tree <= (1 - config.min_saving) * dense or _streams_anywhere(model, longest, config):
        return None
    return f"no tree is faster than {dense * 1e3:.0f} ms, what the dense path takes as calibrated"


def _gated(model: nn.Module, min_saving: float, flops: CostEstimate, seconds: CostEstimate | None = None) -> Decision:
    """The decision where only the saving counts."""
    compared, where = seconds or flops, ""
    if (min_saving or seconds) and is_collective(model):
        costs = gathered(model, compared)
        compared = CostEstimate(sum(c.dense for c in costs), sum(c.tree for c in costs))
        where = " on all ranks" if len(costs) > 1 else ""
    what = "FLOPs" if seconds is None else "time"
    gate = f", min_saving {min_saving:.0%}" if min_saving else ""
    saved = f"{compared.saving:.0%} of dense {what} saved{where}{gate}" + (", as calibrated" if seconds else "")
    if compared.saving >= min_saving:
        return Decision(True, saved, flops, seconds)
    return Decision(False, f"only {saved}", flops, seconds, is_gated=True)


def _streams_anywhere(model: nn.Module, tree_tokens: int, config: TreeConfig) -> bool:
    """Whether the tree of this rank, or of one that is tied to it, is larger than memory allows at once."""
    base = causal_lm(model)
    budget = token_budget(base, input_device(base), config.max_tree_tokens_per_chunk)
    streams = config.executor == "streamed" or (config.executor == "auto" and tree_tokens > budget)
    return any(gathered(model, streams)) if is_collective(model) else streams


def _dense_seconds(speeds: Calibration, cost: ModelCost, dense_batches: Sequence[Padded]) -> float:
    return sum(speeds.dense.seconds(cost.padded_work(batch)) for batch in dense_batches)


def _tower_work(model: PreTrainedModel, images: BatchImages | None) -> tuple[Work, Work]:
    """What the vision tower does for every image of every row, and for every distinct one."""
    nothing = Work(0.0, 0.0, 0.0, 0.0)
    if images is None:
        return nothing, nothing
    try:
        return tower_work(model, images.all_units()), tower_work(model, images.units)
    except Exception as error:  # an estimate never stops a run
        say_guessed("cost of the vision tower", model, error)
        return nothing, nothing
