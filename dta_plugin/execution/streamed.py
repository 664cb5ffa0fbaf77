"""Streamed execution: a tree larger than memory runs in chunks, forward and backward, with exactly the same gradients.

First pass, in order: every chunk's log-probs; graphs are kept for the last chunks only, as far as the budget allows.
The caller sees ordinary differentiable log-probs and may compute any loss from them. Backward pass, in reverse: each
chunk's graph, kept or run again, goes backward from d(loss)/d(log-prob); what it owes to its ancestors' keys waits in
the arena (attention/arena.py). Activations are bounded by the budget, keys and values by one root-to-leaf path.

All parameters are inputs of one autograd function, which sums their gradients over the chunks in float32 or wider and
hands each out once. So DDP synchronises once, an error in a chunk leaves no gradient behind, and gradient accumulation,
hooks and `torch.autograd.grad` work as ever.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dta_plugin.attention.arena import Arena, ChunkMask
from dta_plugin.attention.hf import install
from dta_plugin.execution.memory import halve
from dta_plugin.execution.model import causal_lm, lm_head, tree_forward
from dta_plugin.execution.packed import EdgeOutputs, check_every_layer_hit, check_finite, row_inputs, score
from dta_plugin.execution.pieces import Piece, Pieces
from dta_plugin.execution.replay import Autocast, RandomNumbers, plain_checkpointing
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.plan import Path, Plan, plan_chunks
from dta_plugin.tree.trie import PrefixTree

log = logging.getLogger("dta_plugin")


def run_streamed(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    budget: int,
    *,
    backend: str = "auto",
    temperature: float = 1.0,
    return_entropy: bool = False,
    head_dtype: torch.dtype | None = None,
) -> tuple[EdgeOutputs, Plan]:
    """Log-probs of the scored edges, differentiable in all parameters of `model` (wrapped or not), and the plan.

    budget: most tree tokens whose activations are alive at once; halved, and the pass begun anew, where a chunk runs
        out of memory. The other arguments, and what is raised, are those of `run_packed`.
    """
    base = causal_lm(model)
    install(base)
    parameters = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    job = _Job(base, tree, edges, backend, temperature, return_entropy, head_dtype)
    runs: list[_Run] = []

    def forward(_: PreTrainedModel, dta_job: _Job, **__: Any) -> dict[str, torch.Tensor]:
        run, logprobs, entropies = dta_job.begin(budget, keep=bool(parameters))
        runs.append(run)
        if parameters:  # connected here, where DDP looks for the parameters that the outputs depend on
            logprobs, entropies = _Streamed.apply(dta_job, run, logprobs, entropies, *parameters)
        return {"logprobs": logprobs, "entropies": entropies}

    with tree_forward(base, forward):
        result = model(dta_job=job)
    check_finite(result["logprobs"], base)
    (run,) = runs
    entropies = result["entropies"] if return_entropy else None
    return EdgeOutputs(result["logprobs"], entropies, None, "+".join(sorted(run.backends))), run.plan


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What is to be computed, whatever the budget."""

    base: PreTrainedModel
    tree: PrefixTree
    edges: ScoredEdges
    backend: str
    temperature: float
    return_entropy: bool
    head_dtype: torch.dtype | None

    def begin(self, budget: int, keep: bool) -> tuple[_Run, torch.Tensor, torch.Tensor]:
        """The first pass within `budget`, or what memory turns out to allow: the run, log-probs and entropies [E]."""
        while True:
            run = _Run(self, plan_chunks(self.tree, budget, keep), budget)
            try:
                return run, *run.first_pass()
            except torch.OutOfMemoryError:
                smaller = halve(self.base, budget)
                if smaller is None:
                    raise
            budget = smaller

    def finish(
        self, run: _Run, parameters: tuple[nn.Parameter, ...], grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """The backward pass: gradients of the parameters."""
        while True:
            try:
                return run.backward(parameters, grad_logprobs, grad_entropies)
            except torch.OutOfMemoryError:
                smaller = None if run.random.is_drawn else halve(self.base, run.budget)
                if smaller is None:
                    raise
            with torch.no_grad(), run.autocast.entered():
                run, *_ = self.begin(smaller, keep=False)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, run: _Run, logprobs, entropies, *parameters):
        ctx.job, ctx.run, ctx.parameters = job, run, parameters
        return logprobs.clone(), entropies.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, grad_entropies):
        return None, None, None, None, *ctx.job.finish(ctx.run, ctx.parameters, grad_logprobs, grad_entropies)


class _Run:
    """A job under one plan: its first pass and, once, its backward pass."""

    def __init__(self, job: _Job, plan: Plan, budget: int) -> None:
        self.job, self.plan, self.budget = job, plan, budget
        self.pieces = Pieces(job.tree, job.edges, plan)
        self.head = lm_head(job.base, job.head_dtype)
        self.arena, self.path = Arena(plan.arena_tokens), Path(plan)
        self.backends: set[str] = set()
        self.kept: dict[int, list[torch.Tensor]] = {}
        self.random = RandomNumbers.of(job.base, self.pieces.device)
        self.autocast = Autocast.now(self.pieces.device.type)

    def first_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [E], without graph."""
        dtype = torch.promote_types(self.job.base.dtype, torch.float32)
        logprobs, entropies = (self.job.edges.target.new_zeros(len(self.job.edges.target), dtype=dtype) for _ in "le")
        with plain_checkpointing(self.job.base):
            for index in range(len(self.plan.chunks)):
                keeps = index >= self.plan.first_kept
                self.random.remember(index)
                piece = self.pieces.whole(index)
                with torch.set_grad_enabled(keeps):
                    outputs = self._forward(piece, "forward", index)
                self.path.run(index)
                for total, part in zip((logprobs, entropies), outputs[1:], strict=False):
                    total[piece.edges] = part.detach().to(dtype)
                if keeps:
                    self.kept[index] = outputs
        return logprobs, entropies

    def backward(
        self, parameters: tuple[nn.Parameter, ...], grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Gradients of the parameters, each summed over all chunks."""
        totals: list[torch.Tensor | None] = [None] * len(parameters)
        with torch.enable_grad(), self.autocast.entered(), plain_checkpointing(self.job.base):
            for index in reversed(range(len(self.plan.chunks))):
                outputs = self._graph_of(index)
                edges = self.pieces.edges(index)
                # Nothing may be scored in a chunk: its keys still pass on what its descendants left for them.
                seeds = [torch.zeros_like(outputs[0])]
                for grad, output in zip((grad_logprobs, grad_entropies), outputs[1:], strict=False):
                    seeds.append(grad[edges].to(output.dtype))
                found = torch.autograd.grad(outputs, parameters, seeds, allow_unused=True)
                del outputs
                self.path.leave(index)
                for place, part in enumerate(found):
                    if part is not None:
                        totals[place] = _added(totals[place], part)
        return [total if total is None else total.to(p.dtype) for total, p in zip(totals, parameters, strict=True)]

    def _graph_of(self, index: int) -> list[torch.Tensor]:
        """The chunk's outputs with their graph, kept or run again, its ancestors' keys in place."""
        for ancestor in self.path.restore(index):
            # With dropout the trunk must draw the random numbers of its whole chunk again.
            piece = self.pieces.whole(ancestor) if self.random.is_drawn else self.pieces.trunk(ancestor)
            with torch.no_grad(), self.random.again(ancestor):
                self._forward(piece, "rebuild", ancestor, is_scored=False)
        if index in self.kept:
            return self.kept.pop(index)
        with self.random.again(index):
            return self._forward(self.pieces.whole(index), "recompute", index)

    def _forward(self, piece: Piece, what: str, index: int, is_scored: bool = True) -> list[torch.Tensor]:
        """[hidden states, log-probs, entropies] of a chunk; only the first where nothing is scored in it."""
        start = time.perf_counter()
        mask = ChunkMask(piece.exit, piece.depth, self.job.backend, self.arena, piece.first, piece.trunk)

        def forward(model: PreTrainedModel, **inputs: Any) -> list[torch.Tensor]:
            hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
            if not is_scored or not len(piece.edges):
                return [hidden]
            rows = hidden[0].index_select(0, piece.rows)
            options = (self.job.temperature, self.job.return_entropy)
            logprobs, entropies = score(rows, self.head, piece.targets, piece.row_of_edge, *options)
            return [hidden, logprobs] if entropies is None else [hidden, logprobs, entropies]

        with tree_forward(self.job.base, forward):
            outputs = self.job.base(**row_inputs(piece.input_ids, piece.depth, mask))
        check_every_layer_hit(self.job.base, mask)
        self.backends |= mask.backends_used
        seconds = time.perf_counter() - start
        place = f"chunk {index + 1} of {len(self.plan.chunks)}, {what}"
        log.debug("dta: %s: %d tokens behind %d ancestors, %.3f s", place, len(piece.depth), piece.first, seconds)
        return outputs


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)
