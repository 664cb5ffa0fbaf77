"""The two passes over the chunks of a plan: forward for log-probs, and in reverse for gradients.

A chunk's graph is kept, or the chunk runs again. The first chunk goes backward last. Where gradients are summed over
ranks it does so in a pass that DDP, DeepSpeed or FSDP2 watches: as its layers finish one by one, their gradients,
complete by then, travel while the others are computed. For DDP and DeepSpeed that is the caller's own pass, which the
first chunk's graph is handed to; for FSDP2 it is one within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.ranks import ModelCalls, watches_gradients
from dta_plugin.execution.streaming.chunk_inputs import PlanInputs
from dta_plugin.execution.streaming.chunk_plan import CachedPath
from dta_plugin.execution.streaming.chunk_runner import ChunkGraph, ChunkRunner, StreamedJob
from dta_plugin.execution.streaming.fsdp2 import check_backward_is_own, gradients_held_back, reshard
from dta_plugin.execution.streaming.gradient_sums import GradientSums
from dta_plugin.execution.streaming.kv_arena import Arena
from dta_plugin.execution.streaming.recomputation import RandomNumbers

_DUMMY = -1  # the place of dummies among the chunks whose random state is remembered


class StreamedRun:
    """A job under one plan: its first pass, and its backward pass.

    parameters: the trainable ones by name, as the first chunk saw them. handed_out: that chunk, without its graph, if
    the graph goes to the caller.
    """

    parameters: Mapping[str, torch.Tensor]

    def __init__(self, job: StreamedJob, budget: int, is_differentiable: bool) -> None:
        self.job, self.budget, self.is_differentiable = job, budget, is_differentiable
        self.plan = job.planner(job.tree, budget, is_differentiable)
        self.calls = ModelCalls.from_plan(self.plan).most_of_all_ranks(job.model) if job.is_sharded else None
        self.inputs = PlanInputs(job.tree, job.edges, self.plan, job.images)
        self.runner = ChunkRunner(job, self.inputs.device)
        self.arena, self.path = Arena(self.plan.arena_tokens), CachedPath(self.plan)
        self.handed_out: ChunkGraph | None = None
        self.kept: dict[int, ChunkGraph] = {}
        self.random = RandomNumbers.from_model(job.base, self.inputs.device)
        self.is_spent = False

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Log-probs and entropies [E], without graph; outputs of the first chunk, if it is handed out."""
        count = len(self.job.edges.target)
        dtype = accumulation_dtype(self.job.base.dtype)
        logprobs, entropies = self.job.edges.target.new_zeros(2, count, dtype=dtype).unbind()
        handed_out: list[torch.Tensor] = []
        for index in range(len(self.plan.chunks)):
            self.random.remember(index)
            if index == 0 and self.is_differentiable and watches_gradients(self.job.model):
                graph = self._hand_out()
                handed_out = graph.outputs
            else:
                graph = self._first_run(index)
            if index == 0:
                leaves = {} if self.job.tower is None else self.job.tower.leaves
                self.parameters = {name: p for name, p in graph.parameters.items() if name not in leaves}
            self.path.run(index)
            for total, part in zip((logprobs, entropies), graph.outputs[1:], strict=False):
                total[self.inputs.edges(index)] = part.detach().to(dtype)
        if self.calls is not None:
            self._call_along(self.calls.forward - len(self.plan.chunks))
        return logprobs, entropies, handed_out

    def backward(self, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor) -> GradientSums:
        """Gradients of the parameters, summed over all chunks but one that was handed out.

        If FSDP2 shards the model they end in `.grad` instead, as in any backward pass, and there can only be one.
        """
        sums, gradients = GradientSums(), (grad_logprobs, grad_entropies)
        if self.job.is_sharded:
            self._check_first_backward()
        try:
            with torch.enable_grad():
                with gradients_held_back(self.job.model):
                    count = len(self.plan.chunks) if self.calls is None else len(self.calls.before_backward)
                    for index in reversed(range(1, count)):
                        self._backward(index, gradients, sums.add)
                if self.handed_out is None:
                    self._backward(0, gradients, sums.complete if self.job.is_sharded else sums.add)
                    self.arena.clear()
        except BaseException:
            self.forget()
            reshard(self.job.model)
            raise
        return sums

    def forget(self) -> None:
        """Drop what a backward pass that breaks off has left."""
        self.kept.clear()
        self.arena.drop_gradients()

    def _check_first_backward(self) -> None:
        check_backward_is_own(self.job.model)
        if self.is_spent:
            raise InvalidInputError(
                "A second backward pass through a streamed call of a model that FSDP2 shards. Expected one: sum the "
                "losses first, or use executor='packed'."
            )
        self.is_spent = True

    def _backward(self, index: int, gradients: tuple[torch.Tensor, torch.Tensor], sink: Callable[..., None]) -> None:
        """sink: `add` or `complete` of the sums."""
        if index < len(self.plan.chunks):
            graph = self._graph_of(index)
            sink(graph.outputs, graph.gradients(self.inputs.edges(index), *gradients), graph.parameters)
            self.path.leave(index)
        else:
            self._fill_up(index, own_calls=1)
            graph = self._run_dummy()
            sink(graph.outputs, [torch.zeros_like(x) for x in graph.outputs], graph.parameters)

    def _first_run(self, index: int) -> ChunkGraph:
        keeps = index >= self.plan.first_kept
        with torch.set_grad_enabled(keeps):
            graph = self.runner.run(self.inputs.chunk(index), self.arena, self._name(index))
        if keeps:
            self.kept[index] = graph
        return graph

    def _hand_out(self) -> ChunkGraph:
        """The first chunk. Unless all graphs are kept, it runs again by itself when its graph goes backward.

        Its graph holds this run, which must not hold it, or nothing would ever free either.
        """
        chunk = self.inputs.chunk(0)
        features = None if self.job.tower is None else self.job.tower.features
        runs: list[Mapping[str, torch.Tensor]] = []

        def run(_: torch.Tensor) -> list[torch.Tensor]:
            what = self._name(0, again=bool(runs))
            graph = self.runner.run(chunk, self.arena, what, needs_head=True, features=features)
            runs.append(graph.parameters)
            return graph.outputs

        is_kept = self.plan.first_kept == 0
        outputs = run(chunk.input_ids) if is_kept else checkpoint(run, chunk.input_ids, use_reentrant=False)
        self.handed_out = ChunkGraph([x.detach() for x in outputs], runs[0])
        return ChunkGraph(outputs, runs[0])

    def _graph_of(self, index: int) -> ChunkGraph:
        """The chunk's graph, kept or made again, its ancestors' keys in place."""
        own_calls = 0 if index in self.kept else 1
        for part in self.path.restore(index):
            # With dropout, tokens must draw the random numbers of their whole chunk again.
            is_whole = self.random.is_drawn
            again = self.inputs.chunk(part.chunk) if is_whole else self.inputs.cached_tokens(part.chunk, part.start)
            with torch.no_grad(), self.random.again(part.chunk):
                self.runner.run(again, self.arena, f"{self._name(part.chunk)}, cached tokens")
            own_calls += 1
        self._fill_up(index, own_calls)
        if index in self.kept:
            return self.kept.pop(index)
        with self.random.again(index):
            return self.runner.run(self.inputs.chunk(index), self.arena, self._name(index, again=True))

    def _fill_up(self, index: int, own_calls: int) -> None:
        """Before chunk `index` goes backward: as many calls as the rank with most makes."""
        if self.calls is not None:
            self._call_along(self.calls.before_backward[index] - own_calls)

    def _call_along(self, times: int) -> None:
        """Call the model as often as other ranks do, for nothing."""
        for _ in range(times):
            with torch.no_grad():
                self._run_dummy()

    def _run_dummy(self) -> ChunkGraph:
        self.random.remember(_DUMMY)
        with self.random.again(_DUMMY):
            return self.runner.run(self.inputs.dummy(), Arena(1), "dummy")

    def _name(self, index: int, again: bool = False) -> str:
        return f"chunk {index + 1} of {len(self.plan.chunks)}" + (", again" if again else "")
