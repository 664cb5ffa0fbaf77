"""Streamed execution: a tree larger than memory runs in chunks, forward and backward, with exactly the same gradients.

First pass, in order: every chunk's log-probs; graphs are kept for the last chunks only, as far as the budget allows.
The caller sees ordinary differentiable log-probs and may compute any loss from them. Backward pass, in reverse: each
chunk's graph, kept or run again, goes backward from d(loss)/d(log-prob); what it owes to its ancestors' keys waits in
the arena (kv_arena.py). Activations are bounded by the budget, keys and values by one root-to-leaf path.

All parameters are inputs of one autograd function, which sums their gradients over the chunks in float32 or wider and
hands each out once. So gradients are reduced over ranks once, an error in a chunk leaves no gradient behind, and
gradient accumulation works as ever, as does `torch.autograd.grad` (which FSDP2 never knew).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dta_plugin.execution.memory import halve, is_out_of_memory
from dta_plugin.execution.packed import EdgeOutputs, check_finite
from dta_plugin.execution.ranks import is_sharded
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.execution.streaming.chunk_runner import Planner, StreamedJob
from dta_plugin.execution.streaming.chunking import plan_chunks
from dta_plugin.execution.streaming.gradient_sums import GradientSums
from dta_plugin.execution.streaming.recomputation import Autocast
from dta_plugin.execution.streaming.streamed_run import StreamedRun
from dta_plugin.models.introspection import causal_lm, tree_forward
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree


def run_streamed(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    budget: int,
    *,
    images: TreeImages | None = None,
    backend: str = "auto",
    temperature: float = 1.0,
    return_entropy: bool = False,
    head_dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    planner: Planner = plan_chunks,
) -> tuple[EdgeOutputs, ChunkPlan]:
    """Log-probs of the scored edges, differentiable in all parameters of `model` (wrapped or not), and the plan.

    budget: most tree tokens whose activations are alive at once; halved, and the pass begun anew, where a chunk runs
        out of memory. planner: how the tree is cut. The other arguments, and what is raised, are those of `run_packed`.
        If FSDP2 shards the model, every rank must call it, and out of memory is an error.
    """
    base = causal_lm(model)
    job = StreamedJob(
        model, base, is_sharded(model), tree, edges, images, backend, temperature, return_entropy, head_dtype, planner
    )
    if job.is_sharded:
        run, logprobs, entropies = _begun(job, budget)
    else:
        runs: list[StreamedRun] = []

        def forward(_: PreTrainedModel, dta_job: StreamedJob, **__: Any) -> dict[str, torch.Tensor]:
            run, logprobs, entropies = _begun(dta_job, budget)
            runs.append(run)
            return {"logprobs": logprobs, "entropies": entropies}

        with tree_forward(base, forward):  # one call, in which DDP looks for the parameters that outputs depend on
            result = model(dta_job=job)
        (run,), logprobs, entropies = runs, result["logprobs"], result["entropies"]
    if not allow_nonfinite:
        check_finite(logprobs, base)
    outputs = EdgeOutputs(logprobs, entropies if return_entropy else None, None, "+".join(sorted(run.runner.backends)))
    return outputs, run.plan


@torch.compiler.disable
def _begun(job: StreamedJob, budget: int) -> tuple[StreamedRun, torch.Tensor, torch.Tensor]:
    """The first pass; its log-probs and entropies [E], differentiable where gradients are asked for."""
    is_differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in job.model.parameters())
    job = job.with_tower()
    run, logprobs, entropies, handed_out = _first_pass(job, budget, is_differentiable)
    if is_differentiable:
        # Parameters that FSDP2 has gathered get their gradients within; the caller's pass needs anything to come by.
        anchor = torch.zeros((), requires_grad=True)
        depends_on = [anchor] if job.is_sharded else [*handed_out, *job.trained_features, *run.parameters.values()]
        logprobs, entropies = _Streamed.apply(run, logprobs, entropies, *depends_on)
    return run, logprobs, entropies


def _first_pass(
    job: StreamedJob, budget: int, is_differentiable: bool
) -> tuple[StreamedRun, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The first pass within `budget`, or what memory turns out to allow; see `StreamedRun.forward`."""
    while True:
        run = StreamedRun(job, budget, is_differentiable)
        try:
            return run, *run.forward()
        except (RuntimeError, MemoryError) as error:
            budget = _smaller(run, error)


def _backward_pass(
    first: StreamedRun, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
) -> tuple[list[torch.Tensor], GradientSums]:
    """Gradients for the first chunk's outputs, if it was handed out, and for the parameters from all other chunks."""
    run = first
    while True:
        try:
            sums = run.backward(grad_logprobs, grad_entropies)
            break
        except (RuntimeError, MemoryError) as error:
            if run.random.is_drawn or not is_out_of_memory(
                error
            ):  # other random numbers than those of the log-probs that the caller has
                raise
            budget = _smaller(run, error)
        with torch.no_grad(), first.runner.autocast.entered():
            run, *_ = _first_pass(first.job, budget, is_differentiable=False)
    if first.handed_out is None:
        return [], sums
    if run is not first:  # the new run has done the whole tree, that chunk included
        grad_logprobs, grad_entropies = torch.zeros_like(grad_logprobs), torch.zeros_like(grad_entropies)
    return first.handed_out.gradients(first.inputs.edges(0), grad_logprobs, grad_entropies), sums


def streamed_gradients(
    job: StreamedJob,
    budget: int,
    autocast: Autocast,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Gradients of the parameters by name, from those of log-probs and entropies [E] that were computed otherwise.

    autocast: that of the pass which has computed them.
    """
    with autocast.entered():
        with torch.enable_grad():
            job = job.with_tower()
        with torch.no_grad():
            run, *_ = _first_pass(job, budget, is_differentiable=False)
    _, sums = _backward_pass(run, grad_logprobs, grad_entropies)
    if job.tower is not None:
        job.tower.go_backward(sums, run.parameters)
    return dict(zip(run.parameters, sums.hand_out(run.parameters), strict=True))


def _smaller(run: StreamedRun, error: Exception) -> int:
    """The budget to begin anew with. Raises `error` where that is impossible, or where it is another one."""
    if not is_out_of_memory(error):
        raise error
    if run.job.is_sharded:
        raise torch.OutOfMemoryError(
            f"Out of memory with {run.budget} tokens per chunk. One rank cannot begin anew alone where FSDP2 shards "
            f"the model: set max_tree_tokens_per_chunk below {run.budget}."
        ) from error
    smaller = halve(run.job.base, run.budget)
    if smaller is None:
        raise error
    return smaller


class _Streamed(torch.autograd.Function):
    """The log-probs of all chunks, as functions of the first one's outputs, if handed out, features of images, and all
    parameters."""

    @staticmethod
    def forward(ctx: Any, run: StreamedRun, logprobs, entropies, *_: torch.Tensor):
        ctx.run = run
        return logprobs.clone(), entropies.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, grad_entropies):
        handed_out, sums = _backward_pass(ctx.run, grad_logprobs, grad_entropies)
        if ctx.run.job.is_sharded:
            return None, None, None, None
        features = [] if ctx.run.job.tower is None else sums.hand_out(ctx.run.job.tower.leaves)
        return None, None, None, *handed_out, *features, *sums.hand_out(ctx.run.parameters)
