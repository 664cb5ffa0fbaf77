"""One chunk, one call of the model: what a streamed run computes, and who runs its chunks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.packed import check_every_layer_hit, row_inputs, score
from dta_plugin.execution.streaming.chunk_inputs import ChunkInputs
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.execution.streaming.fsdp2 import parameters_in_use
from dta_plugin.execution.streaming.kv_arena import Arena, ChunkMask
from dta_plugin.execution.streaming.recomputation import Autocast, plain_checkpointing
from dta_plugin.execution.streaming.tower import Tower
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import decoder_of, is_checkpointed, lm_head, tree_forward
from dta_plugin.models.recurrent_layers import layer_of, mixers
from dta_plugin.models.rotary import as_long_as
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.models.vision.forward import decoder_call
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree

log = logging.getLogger("dta_plugin")
Planner = Callable[[PrefixTree, int, bool], ChunkPlan]


@dataclass(frozen=True, slots=True, eq=False)
class StreamedJob:
    """What is to be computed, whatever the budget. base: the causal LM inside `model`, which FSDP2 may shard."""

    model: nn.Module
    base: PreTrainedModel
    is_sharded: bool
    tree: PrefixTree
    edges: ScoredEdges
    images: TreeImages | None
    backend: str
    temperature: float
    return_entropy: bool
    head_dtype: torch.dtype | None
    planner: Planner
    tower: Tower | None = None

    def with_tower(self) -> StreamedJob:
        """The job with what the tower makes of its images, if there are any; once."""
        if self.images is None:
            return self
        return replace(self, tower=Tower.from_images(self.base, self.images, self.edges.target.device))

    @property
    def trained_features(self) -> list[torch.Tensor]:
        """Features of images that have a graph."""
        return [] if self.tower is None else self.tower.trained


@dataclass(frozen=True, slots=True, eq=False)
class ChunkGraph:
    """A chunk that has run. outputs: hidden states, and log-probs and entropies of its edges where it has any.

    parameters: the trainable ones by name, as they were when it ran.
    """

    outputs: list[torch.Tensor]
    parameters: Mapping[str, torch.Tensor]

    def gradients(
        self, edges: torch.Tensor, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of the outputs, from those of all edges [E]. edges: int64 [E'] those of the chunk.

        Nothing may be scored in a chunk: its keys still pass on what its descendants left for them.
        """
        found = [torch.zeros_like(self.outputs[0])]
        for grad, output in zip((grad_logprobs, grad_entropies), self.outputs[1:], strict=False):
            found.append(grad[edges].to(output.dtype))
        return found


class ChunkRunner:
    """Calls the model with chunks of a job's tree. backends: who has computed attention."""

    def __init__(self, job: StreamedJob, device: torch.device) -> None:
        self.job = job
        self.head = lm_head(job.base, job.head_dtype)
        self.autocast = Autocast.now(device.type)
        self.backends: set[str] = set()
        self.longest = int(job.tree.depth.max()) + 1

    def run(
        self,
        chunk: ChunkInputs,
        arena: Arena,
        what: str,
        needs_head: bool = False,
        features: Sequence[torch.Tensor] | None = None,
    ) -> ChunkGraph:
        """what: for the log. needs_head: the LM head takes part in the graph even if nothing is scored. features: of
        images, None for those that all chunks read."""
        start = time.perf_counter()
        job = self.job
        leaves: Mapping[str, torch.Tensor] = {}
        if features is None and job.tower is not None:
            features, leaves = job.tower.for_chunks, job.tower.leaves
        install(job.base)
        mask = chunk_mask(chunk, job.backend, arena)
        runs_head = job.is_sharded or needs_head or len(chunk.edges) > 0

        def forward(model: PreTrainedModel, dta_inputs: dict[str, Any], **_: Any) -> list[torch.Tensor]:
            if chunk.images is None or features is None:
                hidden = decoder_of(model)(**dta_inputs).last_hidden_state
            else:
                hidden = decoder_call(model, dta_inputs, chunk.images, features).last_hidden_state
            return [hidden, *self._scored(hidden[0], chunk)] if runs_head else [hidden]

        inputs = row_inputs(chunk.input_ids, chunk.depth, mask)
        # Weights that were cast in a call without gradient are of no use to one with: torch 2.8 reuses them.
        torch.clear_autocast_cache()
        with (
            self.autocast.entered(),
            plain_checkpointing(job.base),
            as_long_as(job.base, self.longest),
            parameters_in_use(job.model) as parameters,
        ):
            if job.is_sharded:  # through the wrapper, which gathers the weights
                with tree_forward(job.base, forward):
                    outputs = job.model(dta_inputs=inputs)
            else:  # within the wrapper's call
                outputs = forward(job.base, inputs)
        check_every_layer_hit(job.base, mask)
        _check_repeats(job.base, mask)
        mask.close()
        self.backends |= mask.backends_used
        seconds = time.perf_counter() - start
        log.debug("dta: %s: %d tokens behind %d ancestors, %.3f s", what, len(chunk.depth), chunk.first, seconds)
        return ChunkGraph(outputs, {**parameters, **leaves})

    def _scored(self, hidden: torch.Tensor, chunk: ChunkInputs) -> list[torch.Tensor]:
        """Log-probs and, if asked for, entropies of a chunk's edges [E']; the head runs even if there are none."""
        count = len(chunk.edges)
        nothing = chunk.depth.new_zeros(1)
        rows, targets, row_of_edge = (x if count else nothing for x in (chunk.rows, chunk.targets, chunk.row_of_edge))
        on_both = row_of_edge, chunk.host_row_of_edge if count else np.zeros(1, dtype=np.int64)
        own = chunk.temperature if chunk.temperature is not None and count else self.job.temperature
        scores = score(hidden.index_select(0, rows), self.head, targets, *on_both, own, self.job.return_entropy)
        return [values if count else values[:0].clone() for values in scores if values is not None]


def chunk_mask(chunk: ChunkInputs, backend: str, arena: Arena) -> ChunkMask:
    """The mask of a chunk behind its ancestors in the arena, which no layer has used yet."""
    return ChunkMask(
        chunk.exit,
        chunk.depth,
        backend,
        arena,
        chunk.first,
        chunk.cached,
        chunk.host,
        chunk.leaves,
        chunk.reach,
        chunk.host_reach,
    )


def _check_repeats(model: PreTrainedModel, mask: ChunkMask) -> None:
    """Recomputed in the backward pass, the calls of one layer come in an order that nothing tells them apart by."""
    recurrent = {id(mixer): layer_of(mixer) for mixer in mixers(model)}
    attending = {layer for layer, calls in mask.calls.items() if calls > 1}
    repeated = sorted(attending | {recurrent[mixer] for mixer, calls in mask.state_calls.items() if calls > 1})
    if repeated and model.training and is_checkpointed(model):
        raise UnsupportedError(
            f"Layer(s) {repeated} of {type(model).__name__} run more than once, and gradient checkpointing is on. "
            "Expected one call per layer for executor='streamed' with checkpointing; switch checkpointing off, which "
            "streaming does not need, or use executor='packed'."
        )
