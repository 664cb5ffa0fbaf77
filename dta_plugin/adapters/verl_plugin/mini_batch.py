"""How one mini-batch runs: what each rank finds in its rows, what all of them make of it, and what ran in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensordict import TensorDict
from transformers import PreTrainedModel
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric

from dta_plugin.adapters.verl_plugin.images import position_obstacle, row_images
from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, may_regroup, planner
from dta_plugin.adapters.verl_plugin.obstacles import batch_obstacle, engine_obstacle
from dta_plugin.adapters.verl_plugin.protocols import Engine
from dta_plugin.adapters.verl_plugin.tokens import selection_obstacle
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.models.introspection import causal_lm, model_cost
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision.batch_images import BatchImages
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.training.metrics import reduction_of
from dta_plugin.training.placement.micro_batches import BudgetPlanner, SizePlanner
from dta_plugin.training.run_counts import RunCounts
from dta_plugin.training.tokens import DrawnTokens
from dta_plugin.tree.cost import CostEstimate

_AGGREGATIONS = {"sum": AggregationType.SUM, "mean": AggregationType.MEAN, "max": AggregationType.MAX}
# Of a drawing; of all tokens on a rank that has none to draw from: verl's gathering needs the same names everywhere.
_OF_ALL_TOKENS = {
    "dta/kept_fraction": 1.0,
    "dta/mean_weight": 1.0,
    "dta/effective_sample_size": 1.0,
    "dta/max_weight": 1.0,
    "dta/predicted_variance": 0.0,
}


@dataclass(slots=True)
class MiniBatchRun:
    """One mini-batch on one rank. config: as it applies to its micro-batches, None where it takes verl's own path.

    drawn: its token selection, if there is one.
    """

    config: TreeConfig | None
    is_update: bool
    drawn: DrawnTokens | None = None
    counts: RunCounts = field(default_factory=RunCounts)

    def metrics(self) -> dict[str, Metric]:
        """For verl's logger; the same names on every rank."""
        values: dict[str, float] = {} if self.drawn is None else _OF_ALL_TOKENS | self.drawn.metrics
        values |= self.counts.step_metrics()
        return {name: Metric(_AGGREGATIONS[reduction_of(name)], value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Findings:
    """What one rank finds in its part of a mini-batch, for all to decide on.

    invalid: why tokens cannot be drawn, or images do not fit their rows, which ends the run. obstacle: why a tree would
    not be exact. micro_batches: how many it would make, where rows may move. rows: how many it has. is_cut: whether
    some of their tokens do not run.
    """

    invalid: str | None
    obstacle: str | None
    micro_batches: int | None
    rows: int
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The same on all ranks. obstacle: why verl's own path runs. micro_batches: how many each. is_cut: any of them."""

    obstacle: str | None
    micro_batches: int | None
    is_cut: bool = False


def find(
    engine: Engine, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool, key: str
) -> tuple[Findings, BudgetPlanner | SizePlanner | None]:
    """Look at a mini-batch whose tokens have been chosen; with what plans its micro-batches, if anything may.

    key: where the command has the options.
    """
    invalid = None if forward_only else selection_obstacle(data, loss_function, config, key)
    obstacle = engine_obstacle(engine) or tree_obstacle(engine.module) or batch_obstacle(data)
    if invalid is not None or obstacle is not None:
        return Findings(invalid, obstacle, None, len(data)), None
    model = causal_lm(engine.module)
    try:
        rows, images = _rows_and_images(data, model)
    except InvalidInputError as error:
        return Findings(str(error), None, None, len(data)), None
    except UnsupportedError as error:
        return Findings(None, error.reason, None, len(data)), None
    obstacle, plans = position_obstacle(data, images), None
    if obstacle is None and may_regroup(data, config.regroup, loss_function, forward_only):
        sequences = rows.runs.sequences if images is None else images.identities()
        plans = planner(data, sequences, model_cost(model))
    count = None if plans is None else plans.count
    return Findings(None, obstacle, count, len(data), rows.read is not None), plans


def _rows_and_images(data: TensorDict, model: PreTrainedModel) -> tuple[JaggedRows, BatchImages | None]:
    """What of a mini-batch is to run, and its images, if it has any.

    Raises InvalidInputError for images that do not fit their rows, and UnsupportedError where they cannot come into a
    tree.
    """
    if row_images(data) is not None and (reason := images_obstacle(model)) is not None:
        raise UnsupportedError(reason)
    rows = JaggedRows.from_data(data, model)
    if rows.images is None or all(row is None for row in rows.images):
        return rows, None
    return rows, BatchImages.from_rows(model, rows.runs.sequences, rows.images)


def decide(ranks: Sequence[Findings]) -> Decision:
    """What the findings of all ranks come to. Raises InvalidInputError where what any of them has is invalid."""
    invalid = next((rank.invalid for rank in ranks if rank.invalid is not None), None)
    if invalid is not None:
        raise InvalidInputError(invalid)
    obstacle = next((rank.obstacle for rank in ranks if rank.obstacle is not None), None)
    if obstacle is not None:
        return Decision(obstacle, None)
    counts = [rank.micro_batches for rank in ranks if rank.micro_batches is not None]
    is_possible = len(counts) == len(ranks) and max(counts) <= min(rank.rows for rank in ranks)
    return Decision(None, max(counts) if is_possible else None, any(rank.is_cut for rank in ranks))


def cost_on_all_ranks(engine: Engine, data: TensorDict, is_cut: bool) -> CostEstimate:
    """In FLOPs: of verl's own path, which computes all tokens, and of trees of those that are to run.

    All ranks must call it, and prepare equally many batches: is_cut is as they have decided.
    """

    def cost_of(rows: JaggedRows) -> CostEstimate:
        runs, device = rows.runs, rows.offsets.device
        return prepare_batch(
            engine.module, runs.sequences, runs.scored, TreeConfig(), device=device, images=rows.images
        ).decision.flops

    cost = cost_of(JaggedRows.from_data(data, causal_lm(engine.module)))
    if is_cut:
        cost = CostEstimate(cost_of(JaggedRows.whole(data)).dense, cost.tree)
    costs = agreed(cost, engine.get_data_parallel_group())
    return CostEstimate(sum(cost.dense for cost in costs), sum(cost.tree for cost in costs))


def config_of_micro_batches(data: TensorDict, config: TreeConfig, strategy: str) -> TreeConfig:
    """The gate has been passed; a sequence beyond the token budget runs in chunks where the strategy can."""
    config = replace(config, min_saving=0.0)
    if tu.get_non_tensor_data(data, "use_dynamic_bsz", True) and strategy == "fsdp2" and config.executor != "packed":
        budget = config.max_tree_tokens_per_chunk or int(tu.get_non_tensor_data(data, "max_token_len_per_gpu", 0))
        return replace(config, max_tree_tokens_per_chunk=budget)
    return config
