"""A batch made ready to run, and what comes back: the tree, what is scored, and whether the tree pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.decline import decline
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.calibration_store import Calibration, calibration_of
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.rank_images import along_with_others
from dta_plugin.execution.ranks import DUMMY_SEQUENCE, gathered, is_collective
from dta_plugin.models.indexers import index_length_obstacle
from dta_plugin.models.introspection import causal_lm, input_device, model_cost, say_guessed
from dta_plugin.models.rotary import length_obstacle
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision.batch_images import BatchImages, TreeImages
from dta_plugin.models.vision.cost import tower_work
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.tree.cost import CostEstimate, ModelCost, Padded, estimate
from dta_plugin.tree.layout import Scored, ScoredEdges
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.time_model import Work
from dta_plugin.tree.trie import PrefixTree, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLogProbs:
    """Result of `sequence_logprobs`, one tensor of length len - 1 per sequence; entry i belongs to token i + 1.

    Attributes:
        logprobs: log p(token i + 1 | tokens ..i) in nats, float32 or float64 [len - 1], differentiable, 0 where
            unscored.
        entropies: of the distribution that token i + 1 was drawn from, in nats, alike; or None.
        router_loss: MoE load-balancing loss of the flat batch, a scalar, or None.
        report: what was shared and how it ran.
        anchor: 0, differentiable in all parameters: the loss of a DDP or FSDP2 rank that has no sequences.
    """

    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor] | None
    router_loss: torch.Tensor | None
    report: TreeReport
    anchor: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PreparedBatch:
    """A batch that is ready to run: its tree, what is scored, and the decision with its reason.

    sequences: without any, the tree is of a stand-in that takes part in what the other ranks do. cost: in FLOPs.
    seconds: the same as predicted, where the machine was calibrated.
    is_gated: the tree would be exact, but does not save enough. temperatures: per sequence, where they differ; these
    count then, not the one that `run_tree` is given. image_rows: per sequence, its images as they were given, if there
    are any; images: the same, as the tree has them.
    """

    sequences: list[TokenSequence]
    scored: Scored | None
    tree: PrefixTree
    edges: ScoredEdges
    cost: CostEstimate
    use_tree: bool
    reason: str
    is_gated: bool = False
    temperatures: Sequence[float] | None = None
    image_rows: list[ImageInputs | None] | None = None
    images: TreeImages | None = None
    seconds: CostEstimate | None = None

    def unscored(self) -> tuple[torch.Tensor, ...]:
        """bool [len - 1] per sequence: which of its tokens 1.. are not scored."""
        return (self.edges.edge_of_token == len(self.edges.target)).split(self.edges.lengths)

    def rows(self) -> list[tuple[TokenSequence, ImageInputs | None]]:
        """Every sequence with its images."""
        return list(zip(self.sequences, self.image_rows or [None] * len(self.sequences), strict=True))

    def temperatures_or(self, common: float) -> list[float]:
        """One per sequence: its own, or the common one."""
        return [common] * len(self.sequences) if self.temperatures is None else list(self.temperatures)


def prepare_batch(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    scored: Scored | None,
    config: TreeConfig,
    dense_batches: Sequence[Padded] = (),
    *,
    temperatures: Sequence[float] | None = None,
    device: torch.device | None = None,
    images: Sequence[ImageInputs | None] | None = None,
) -> PreparedBatch:
    """Build the tree and decide between tree and dense.

    dense_batches: the dense micro-batches that would run in place of the tree. With them and a calibration, the gate
    goes by predicted time, else by FLOPs. temperatures: per sequence, where they differ. device: where the model
    computes, None for where its input embedding is (which an offloaded one is not). images: per sequence, what the
    model's processor returned for its images, or None; see `BatchImages`.

    Raises InvalidInputError for unusable sequences or images, UnsupportedError where the tree would not be exact and
    ``config.on_unsupported == "error"``.
    """
    is_dummy = not len(sequences) and is_collective(model)
    image_rows = _image_rows(images)
    reason = tree_obstacle(model) or _lengths_obstacle(causal_lm(model), [len(sequence) for sequence in sequences])
    reason = reason or (images_obstacle(causal_lm(model)) if image_rows else None)
    if reason is not None:
        reason = decline(reason, config.on_unsupported).reason
    base = causal_lm(model)
    _check_weights(base)
    batch_images: BatchImages | None = None
    if image_rows and reason is None:
        try:
            batch_images = BatchImages.from_rows(base, sequences, image_rows)
        except UnsupportedError as error:  # of these rows, where the model's own code has a way
            reason = decline(error, config.on_unsupported).reason
    if batch_images is None:
        tree, own_images = PrefixTree.from_sequences([DUMMY_SEQUENCE] if is_dummy else sequences), None
    else:
        tree, own_images = batch_images.merged()
    tree_images, reason = along_with_others(model, tree, own_images, reason)
    _check_vocabulary(tree, base, tree_images)
    if is_dummy:
        scored = temperatures = None
    edges = ScoredEdges.from_tree(tree, scored, device or input_device(base), temperatures)
    weights = model_cost(base)
    tower = _Tower.of(base, batch_images)
    flops = estimate(tree, weights, edges.host.scored_tokens, len(edges.rows))
    cost = CostEstimate(flops.dense + tower.dense.flops, flops.tree + tower.tree.flops)
    prepared = PreparedBatch(
        list(sequences),
        scored,
        tree,
        edges,
        cost,
        use_tree=False,
        reason=reason or "",
        temperatures=temperatures,
        image_rows=image_rows,
        images=tree_images,
    )
    if reason is not None:
        return prepared
    speeds = calibration_of(model, config) if dense_batches else None
    if speeds is not None and _streams_anywhere(model, tree.tree_tokens, config):
        speeds = None  # what memory asks for is not compared by time
    seconds = None if speeds is None else _predicted(speeds, weights, tree, edges, dense_batches, tower)
    use_tree, reason = _gate(model, cost, seconds, config.min_saving)
    return replace(prepared, use_tree=use_tree, reason=reason, is_gated=not use_tree, seconds=seconds)


def _image_rows(images: Sequence[ImageInputs | None] | None) -> list[ImageInputs | None] | None:
    """None where no row has any."""
    return list(images) if images is not None and any(row is not None for row in images) else None


# Models whose weights have been found in memory: it takes a walk over all of them.
_in_memory: WeakSet[PreTrainedModel] = WeakSet()


def _check_weights(model: PreTrainedModel) -> None:
    if model in _in_memory:
        return
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise UnsupportedError(
            f"{len(missing)} weights of {type(model).__name__} are on the meta device, such as {missing[0]}. Expected "
            "all in memory; load the model without offloading (device_map='auto' offloads what does not fit)."
        )
    _in_memory.add(model)


def _lengths_obstacle(model: PreTrainedModel, lengths: list[int]) -> str | None:
    """Why rows of these lengths cannot be exact together."""
    return length_obstacle(model, lengths) or index_length_obstacle(model, lengths)


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
    weights = model_cost(causal_lm(model))
    dense = _dense_seconds(speeds, weights, dense_batches)
    tree = speeds.tree.seconds(weights.work(longest, np.arange(longest), scored))
    if tree <= (1 - config.min_saving) * dense or _streams_anywhere(model, longest, config):
        return None
    return f"no tree is faster than {dense * 1e3:.0f} ms, what the dense path takes as calibrated"


def _streams_anywhere(model: nn.Module, tree_tokens: int, config: TreeConfig) -> bool:
    """Whether the tree of this rank, or of one that is tied to it, is larger than memory allows at once."""
    base = causal_lm(model)
    budget = token_budget(base, input_device(base), config.max_tree_tokens_per_chunk)
    streams = config.executor == "streamed" or (config.executor == "auto" and tree_tokens > budget)
    return any(gathered(model, streams)) if is_collective(model) else streams


def _dense_seconds(speeds: Calibration, weights: ModelCost, dense_batches: Sequence[Padded]) -> float:
    return sum(speeds.dense.seconds(weights.padded_work(batch)) for batch in dense_batches)


class _Tower(NamedTuple):
    """What the vision tower does for a batch: for every image of every row, and for every distinct one."""

    dense: Work = Work(0.0, 0.0, 0.0, 0.0)
    tree: Work = Work(0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, model: PreTrainedModel, images: BatchImages | None) -> _Tower:
        if images is None:
            return cls()
        try:
            return cls(tower_work(model, images.all_units()), tower_work(model, images.units))
        except Exception as error:  # an estimate never stops a run
            say_guessed("cost of the vision tower", model, error)
            return cls()


def _predicted(
    speeds: Calibration,
    weights: ModelCost,
    tree: PrefixTree,
    edges: ScoredEdges,
    dense_batches: Sequence[Padded],
    tower: _Tower,
) -> CostEstimate:
    """Seconds of both ways."""
    as_tree = weights.work(tree.tree_tokens, tree.depth, len(edges.rows))
    return CostEstimate(
        _dense_seconds(speeds, weights, dense_batches) + speeds.dense.seconds(tower.dense),
        speeds.tree.seconds(as_tree) + speeds.tree.seconds(tower.tree),
    )


def _gate(model: nn.Module, flops: CostEstimate, seconds: CostEstimate | None, min_saving: float) -> tuple[bool, str]:
    """Whether the tree saves enough, and the reason. Ranks that are tied together decide by what all of them save."""
    cost, where = seconds or flops, ""
    if (min_saving or seconds) and is_collective(model):
        costs = gathered(model, cost)
        cost = CostEstimate(sum(c.dense for c in costs), sum(c.tree for c in costs))
        where = " on all ranks" if len(costs) > 1 else ""
    what = "FLOPs" if seconds is None else "time"
    gate = f", min_saving {min_saving:.0%}" if min_saving else ""
    saved = f"{cost.saving:.0%} of dense {what} saved{where}{gate}" + (", as calibrated" if seconds else "")
    return (True, saved) if cost.saving >= min_saving else (False, f"only {saved}")


def _check_vocabulary(tree: PrefixTree, model: PreTrainedModel, images: TreeImages | None) -> None:
    """Placeholders of images may have ids of no embedding."""
    size = model.config.get_text_config().vocab_size
    largest = (tree.tokens if images is None else tree.tokens[images.feature < 0]).max(initial=0)
    if largest >= size:
        raise InvalidInputError(
            f"The batch has token id {largest}. Expected ids below the model's vocab_size {size}; check that "
            "the tokenizer belongs to the model."
        )
