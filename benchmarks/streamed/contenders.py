"""The ways to run one policy update on a tree that the streaming benchmark compares, and what one run of each takes.

All compute the log-probs of all completion tokens, the same weighted sum of them, and its gradient. The tree
contenders differ only in how the tree is cut; building the tree and the plan is part of their time.

* `dense`: the unmodified model on one sequence at a time, with a backward pass for each; LM head on completions only.
* `packed`: the whole tree in one call.
* `streamed 1/n`: at most 1/n of the tree's tokens at a time.
* `one path 1/n`: the same executor under the same budget, but a chunk is a single path (one_path.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common.backward import SavedBytes, gradient_error
from benchmarks.common.harness import CLOCKS, synchronize
from benchmarks.common.workloads import Workload
from benchmarks.streamed.one_path import one_path_plan
from dta_plugin import PrefixTree
from dta_plugin.execution.packed import run_packed
from dta_plugin.execution.streaming.autograd import run_streamed
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.execution.streaming.chunking import plan_chunks
from dta_plugin.models.introspection import lm_head
from dta_plugin.models.lm_head import edge_logprobs
from dta_plugin.tree.layout import ScoredEdges

Step = Callable[[], ChunkPlan | None]
Planner = Callable[[PrefixTree, int, bool], ChunkPlan]
PLANNERS: dict[str, Planner] = {"streamed": plan_chunks, "one path": one_path_plan}


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """step: one update's forward and backward pass on `model`; returns the plan if it followed one."""

    model: PreTrainedModel
    step: Step


@dataclass(frozen=True, slots=True)
class Examined:
    """What one run took.

    calls, tokens: of the decoder. chunks, recomputed_tokens, rebuilt_tokens: of the plan.
    saved_bytes: most that autograd held at a time. arena_bytes: keys, values and their gradients beside it.
    device_bytes: most that a CUDA device held beyond what it held before, else None. seconds: by clock.
    error: of the gradients, against packed execution.
    """

    calls: int
    tokens: int
    chunks: int
    recomputed_tokens: int
    rebuilt_tokens: int
    saved_bytes: int
    arena_bytes: int
    device_bytes: int | None
    seconds: dict[str, float]
    error: float


def contenders(
    model: PreTrainedModel, pristine: PreTrainedModel, work: Workload, budgets: dict[str, int]
) -> dict[str, Contender]:
    """Contenders by name; budgets: tokens by the name that a budget has. `pristine` runs dense."""
    found = {"packed": Contender(model, _packed(model, work)), "dense": Contender(pristine, _dense(pristine, work))}
    for name, budget in budgets.items():
        for kind, planner in PLANNERS.items():
            found[f"{kind} {name}"] = Contender(model, _streamed(model, work, budget, planner))
    return found


def examine(steps: dict[str, Contender], tolerance: float) -> dict[str, Examined]:
    """Run each once and watch, `packed` first. Raises Disagreement where gradients differ by more than `tolerance`."""
    expected: dict[str, torch.Tensor] = {}
    examined = {}
    for name, contender in steps.items():
        examined[name], gradients = _watched(contender, expected)
        expected = expected or gradients
        if not examined[name].error <= tolerance:
            error = f"{examined[name].error:.1e}, more than {tolerance:.0e}"
            raise Disagreement(f"Gradients of {name!r} differ from those of 'packed' by {error}.")
    return examined


class Disagreement(Exception):
    """Contenders that should agree do not."""


def _watched(contender: Contender, expected: dict[str, torch.Tensor]) -> tuple[Examined, dict[str, torch.Tensor]]:
    """One run, and its gradients; gradients of the model are cleared before and after."""
    model, device = contender.model, contender.model.device
    model.zero_grad(set_to_none=True)
    saved, sizes = SavedBytes(model), []

    def count(_module: torch.nn.Module, _arguments: Any, options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].numel())

    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    counter = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    start = {clock: read() for clock, read in CLOCKS.items()}
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        plan = contender.step()
    synchronize(device)
    seconds = {clock: read() - start[clock] for clock, read in CLOCKS.items()}
    counter.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    examined = Examined(
        calls=len(sizes),
        tokens=sum(sizes),
        chunks=len(plan.chunks) if plan else len(sizes),
        recomputed_tokens=plan.recomputed_tokens if plan else 0,
        rebuilt_tokens=plan.rebuilt_tokens if plan else 0,
        saved_bytes=saved.peak,
        arena_bytes=plan.arena_tokens * _arena_bytes_per_token(model) if plan else 0,
        device_bytes=torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None,
        seconds=seconds,
        error=gradient_error(gradients, expected or gradients),
    )
    return examined, gradients


def _packed(model: PreTrainedModel, work: Workload) -> Step:
    weights = _flat_weights(work)

    def step() -> None:
        tree = PrefixTree.from_sequences(work.sequences)
        edges = ScoredEdges.from_tree(tree, work.prompt_lengths, weights.device)
        output = run_packed(model, tree, edges)
        (edges.per_token(output.logprobs) * weights).sum().backward()

    return step


def _streamed(model: PreTrainedModel, work: Workload, budget: int, planner: Planner) -> Step:
    weights = _flat_weights(work)

    def step() -> ChunkPlan:
        tree = PrefixTree.from_sequences(work.sequences)
        edges = ScoredEdges.from_tree(tree, work.prompt_lengths, weights.device)
        output, plan = run_streamed(model, tree, edges, budget, planner=planner)
        (edges.per_token(output.logprobs) * weights).sum().backward()
        return plan

    return step


def _dense(model: PreTrainedModel, work: Workload) -> Step:
    head, total = lm_head(model), sum(work.completion_lengths)

    def step() -> None:
        for sequence, prompt, advantage in zip(work.sequences, work.prompt_lengths, work.advantages, strict=True):
            hidden = model.base_model(input_ids=sequence[None], use_cache=False).last_hidden_state[0, prompt - 1 : -1]
            rows = torch.arange(len(hidden), device=hidden.device)
            logprobs, _ = edge_logprobs(hidden, head, sequence[prompt:], rows)
            (-advantage * logprobs.sum() / total).backward()

    return step


def _flat_weights(work: Workload) -> torch.Tensor:
    """[N - S] of tokens 1.. of every sequence: minus its advantage over the number of completion tokens."""
    lengths = torch.tensor([len(sequence) - 1 for sequence in work.sequences], device=work.advantages.device)
    return (-work.advantages / sum(work.completion_lengths)).repeat_interleave(lengths)


def _arena_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values in the model's dtype, their gradients in float32."""
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return elements * (model.dtype.itemsize + torch.promote_types(model.dtype, torch.float32).itemsize)
