"""A batch made ready to run, and what comes back: the tree, what is scored, and whether the tree pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.decline import decline
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.gate import Decision, decide
from dta_plugin.execution.rank_images import along_with_others
from dta_plugin.execution.ranks import DUMMY_SEQUENCE, is_collective
from dta_plugin.models.indexers import index_length_obstacle
from dta_plugin.models.introspection import causal_lm, input_device
from dta_plugin.models.rotary import length_obstacle
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision.batch_images import BatchImages, TreeImages
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.tree.cost import Padded
from dta_plugin.tree.layout import Scored, ScoredEdges
from dta_plugin.tree.report import TreeReport
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
    """A batch that is ready to run: its tree, what is scored, and whether the tree is to run.

    sequences: without any, the tree is of a stand-in that takes part in what the other ranks do. temperatures: per
    sequence, where they differ; these count then, not the one that `run_tree` is given. image_rows: per sequence, its
    images as they were given, if there are any; images: the same, as the tree has them.
    """

    sequences: list[TokenSequence]
    scored: Scored | None
    tree: PrefixTree
    edges: ScoredEdges
    decision: Decision
    temperatures: Sequence[float] | None = None
    image_rows: list[ImageInputs | None] | None = None
    images: TreeImages | None = None

    def with_reason(self, reason: str) -> PreparedBatch:
        """The same for a report that gives this reason."""
        return replace(self, decision=replace(self.decision, reason=reason))

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
    obstacle = _obstacle(model, sequences, has_images=image_rows is not None)
    if obstacle is not None:
        obstacle = decline(obstacle, config.on_unsupported).reason
    base = causal_lm(model)
    _check_weights(base)
    batch_images: BatchImages | None = None
    if image_rows and obstacle is None:
        try:
            batch_images = BatchImages.from_rows(base, sequences, image_rows)
        except UnsupportedError as error:  # of these rows, where the model's own code has a way
            obstacle = decline(error, config.on_unsupported).reason
    if batch_images is None:
        tree, own_images = PrefixTree.from_sequences([DUMMY_SEQUENCE] if is_dummy else sequences), None
    else:
        tree, own_images = batch_images.merged()
    tree_images, obstacle = along_with_others(model, tree, own_images, obstacle)
    _check_vocabulary(tree, base, tree_images)
    if is_dummy:
        scored = temperatures = None
    edges = ScoredEdges.from_tree(tree, scored, device or input_device(base), temperatures)
    decision = decide(model, tree, edges, batch_images, dense_batches, config, obstacle)
    return PreparedBatch(list(sequences), scored, tree, edges, decision, temperatures, image_rows, tree_images)


def _image_rows(images: Sequence[ImageInputs | None] | None) -> list[ImageInputs | None] | None:
    """None where no row has any."""
    return list(images) if images is not None and any(row is not None for row in images) else None


def _obstacle(model: nn.Module, sequences: Sequence[TokenSequence], has_images: bool) -> str | None:
    """Why rows of these lengths, with images or without, cannot be exact together."""
    reason = tree_obstacle(model)
    if reason is not None:
        return reason
    base, lengths = causal_lm(model), [len(sequence) for sequence in sequences]
    reason = length_obstacle(base, lengths) or index_length_obstacle(base, lengths)
    return reason or (images_obstacle(base) if has_images else None)


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


def _check_vocabulary(tree: PrefixTree, model: PreTrainedModel, images: TreeImages | None) -> None:
    """Placeholders of images may have ids of no embedding."""
    size = model.config.get_text_config().vocab_size
    largest = (tree.tokens if images is None else tree.tokens[images.feature < 0]).max(initial=0)
    if largest >= size:
        raise InvalidInputError(
            f"The batch has token id {largest}. Expected ids below the model's vocab_size {size}; check that "
            "the tokenizer belongs to the model."
        )
