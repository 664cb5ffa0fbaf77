"""The two passes over the chunks of a plan: forward for log-probs, and in reverse for gradients.

A chunk's graph is kept, or the chunk runs again. The first chunk goes backward last. Where gradients are summed over
ranks it does so in a pass that DDP, DeepSpeed or FSDP2 watches: as its layers finish one by one, their gradients,
complete by then, travel while the others are computed. For DDP and DeepSpeed that is the caller's own pass, which the
first chunk's graph is handed to; for FSDP2 it is one within.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dta_plugin.attention.arena import Arena, ChunkMask
from dta_plugin.execution.gradients import GradientSums
from dta_plugin.execution.model import lm_head, tree_forward
from dta_plugin.execution.packed import check_every_layer_hit, row_inputs, score
from dta_plugin.execution.pieces import Piece, Pieces
from dta_plugin.execution.ranks import ModelCalls, gradients_held_back, is_sharded, parameters_in_use, watches_gradients
from dta_plugin.execution.replay import Autocast, RandomNumbers, plain_checkpointing
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.plan import Path, Plan
from dta_plugin.tree.trie import PrefixTree

log = logging.getLogger("dta_plugin")
Planner = Callable[[PrefixTree, int, bool], Plan]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is to be computed, whatever the budget. base: the causal LM inside `model`."""

    model: nn.Module
    base: PreTrainedModel
    tree: PrefixTree
    edges: ScoredEdges
    backend: str
    temperature: float
    return_entropy: bool
    head_dtype: torch.dtype | None
    planner: Planner

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A chunk that has run. outputs: hidden states, and log-probs and entropies of its edges where it has any.

    parameters: the trainable ones by name, as they were when it ran.
    """

    outputs: list[torch.Tensor]
    parameters: Mapping[str, torch.Tensor]

    def seeds(
        self, edges: torch.Tensor, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of the outputs. Nothing may be scored in a chunk: its keys still pass on what descendants left."""
        seeds = [torch.zeros_like(self.outputs[0])]
        for grad, output in zip((grad_logprobs, grad_entropies), self.outputs[1:], strict=False):
            seeds.append(grad[edges].to(output.dtype))
        return seeds


class Passes:
    """A job under one plan: its first pass and, once, its backward pass.

    parameters: the trainable ones by name, as the first chunk saw them. first: its graph, if the caller gets it.
    """

    parameters: Mapping[str, torch.Tensor]

    def __init__(self, job: Job, budget: int, is_differentiable: bool) -> None:
        self.job, self.budget, self.is_differentiable = job, budget, is_differentiable
        self.plan = job.planner(job.tree, budget, is_differentiable)
        self.calls = ModelCalls.of(self.plan)
        if job.is_sharded:
            self.calls = self.calls.of_all_ranks()
        self.pieces = Pieces(job.tree, job.edges, self.plan)
        self.head = lm_head(job.base, job.head_dtype)
        self.arena, self.path = Arena(self.plan.arena_tokens), Path(self.plan)
        self.first: Graph | None = None
        self.kept: dict[int, Graph] = {}
        self.backends: set[str] = set()
        self.random = RandomNumbers.of(job.base, self.pieces.device)
        self.autocast = Autocast.now(self.pieces.device.type)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [E], without graph."""
        hands_out = self.is_differentiable and watches_gradients(self.job.model)
        dtype = torch.promote_types(self.job.base.dtype, torch.float32)
        logprobs, entropies = (self.job.edges.target.new_zeros(len(self.job.edges.target), dtype=dtype) for _ in "le")
        for index in range(len(self.plan.chunks)):
            self.random.remember(index)
            if index:
                graph = self._first_run(index)
            else:
                graph = self._handed_out() if hands_out else self._first_run(0)
                self.parameters = graph.parameters
            self.path.run(index)
            for total, part in zip((logprobs, entropies), graph.outputs[1:], strict=False):
                total[self.pieces.edges(index)] = part.detach().to(dtype)
        self._call_along(self.calls.forward - len(self.plan.chunks))
        return logprobs, entropies

    def backward(self, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor) -> GradientSums:
        """Gradients of the parameters, summed over all chunks but one that was handed out.

        If FSDP2 shards the model they end in `.grad` instead, as in any backward pass.
        """
        sums, seeds = GradientSums(), (grad_logprobs, grad_entropies)
        with torch.enable_grad(), self.autocast.entered():
            with gradients_held_back(self.job.model):
                for index in reversed(range(1, len(self.calls.before_backward))):
                    self._backward(index, seeds, sums.add)
            if self.first is None:
                self._backward(0, seeds, sums.complete if self.job.is_sharded else sums.add)
        return sums

    def _backward(self, index: int, seeds: tuple[torch.Tensor, torch.Tensor], run: Callable[..., None]) -> None:
        if index < len(self.plan.chunks):
            graph = self._graph_of(index)
            run(graph.outputs, graph.seeds(self.pieces.edges(index), *seeds), graph.parameters)
            self.path.leave(index)
        else:
            self._call_along(self.calls.before_backward[index] - 1)
            graph = self._stand_in()
            run(graph.outputs, [torch.zeros_like(x) for x in graph.outputs], graph.parameters)

    def forget(self) -> None:
        """Drop what a backward pass that broke off has left."""
        self.kept.clear()
        self.arena.drop_gradients()

    def _first_run(self, index: int) -> Graph:
        keeps = index >= self.plan.first_kept
        with torch.set_grad_enabled(keeps):
            graph = self._run(self.pieces.whole(index), self._name(index))
        if keeps:
            self.kept[index] = graph
        return graph

    def _handed_out(self) -> Graph:
        """The first chunk. Unless all graphs are kept, it runs again by itself when its graph goes backward."""
        piece = self.pieces.whole(0)
        graphs: list[Graph] = []

        def run(_: torch.Tensor) -> list[torch.Tensor]:
            graphs.append(self._run(piece, self._name(0, again=bool(graphs)), needs_head=True))
            return graphs[-1].outputs

        is_kept = self.plan.first_kept == 0
        outputs = run(piece.input_ids) if is_kept else checkpoint(run, piece.input_ids, use_reentrant=False)
        self.first = Graph(outputs, graphs[0].parameters)
        return self.first

    def _graph_of(self, index: int) -> Graph:
        """The chunk's graph, kept or made again, its ancestors' keys in place."""
        calls = self.calls.before_backward[index]
        for ancestor in self.path.restore(index):
            # With dropout the trunk must draw the random numbers of its whole chunk again.
            piece = self.pieces.whole(ancestor) if self.random.is_drawn else self.pieces.trunk(ancestor)
            with torch.no_grad(), self.random.again(ancestor):
                self._run(piece, f"{self._name(ancestor)}, trunk")
            calls -= 1
        if index in self.kept:
            self._call_along(calls)
            return self.kept.pop(index)
        self._call_along(calls - 1)
        with self.random.again(index):
            return self._run(self.pieces.whole(index), self._name(index, again=True))

    def _call_along(self, times: int) -> None:
        """Call the model as often as other ranks do, for nothing."""
        for _ in range(times):
            with torch.no_grad():
                self._stand_in()

    def _stand_in(self) -> Graph:
        return self._run(self.pieces.stand_in(), "stand-in", Arena(1))

    def _name(self, index: int, again: bool = False) -> str:
        return f"chunk {index + 1} of {len(self.plan.chunks)}" + (", again" if again else "")

    def _run(self, piece: Piece, what: str, arena: Arena | None = None, needs_head: bool = False) -> Graph:
        """needs_head: the LM head takes part in the graph even if nothing is scored."""
        start = time.perf_counter()
        job = self.job
        mask = ChunkMask(piece.exit, piece.depth, job.backend, arena or self.arena, piece.first, piece.trunk)
        runs_head = job.is_sharded or needs_head or len(piece.edges) > 0

        def forward(model: PreTrainedModel, dta_inputs: dict[str, Any], **_: Any) -> list[torch.Tensor]:
            hidden = getattr(model, model.base_model_prefix)(**dta_inputs).last_hidden_state
            return [hidden, *self._scored(hidden[0], piece)] if runs_head else [hidden]

        inputs = row_inputs(piece.input_ids, piece.depth, mask)
        with plain_checkpointing(job.base), parameters_in_use(job.model) as parameters:
            if job.is_sharded:  # through the wrapper, which gathers the weights
                with tree_forward(job.base, forward):
                    outputs = job.model(dta_inputs=inputs)
            else:  # within the wrapper's call
                outputs = forward(job.base, inputs)
        check_every_layer_hit(job.base, mask)
        self.backends |= mask.backends_used
        seconds = time.perf_counter() - start
        log.debug("dta: %s: %d tokens behind %d ancestors, %.3f s", what, len(piece.depth), piece.first, seconds)
        return Graph(outputs, parameters)

    def _scored(self, hidden: torch.Tensor, piece: Piece) -> list[torch.Tensor]:
        """Log-probs and, if wanted, entropies of a chunk's edges [E']; the head runs even if there are none."""
        count = len(piece.edges)
        nothing = piece.depth.new_zeros(1)
        rows, targets, row_of_edge = (x if count else nothing for x in (piece.rows, piece.targets, piece.row_of_edge))
        options = (self.job.temperature, self.job.return_entropy)
        scores = score(hidden.index_select(0, rows), self.head, targets, row_of_edge, *options)
        return [values if count else values[:0].clone() for values in scores if values is not None]
