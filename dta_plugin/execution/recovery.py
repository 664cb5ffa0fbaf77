"""Packed execution that survives running out of memory: the tree goes on in chunks of half its size.

Forward, it simply begins anew. Backward, the caller has log-probs already, which are the outputs of one autograd
function of all parameters: where the pass through the tree's graph breaks off, the graph is dropped and the same
gradients are computed in chunks. The function hands them out at its end, so that a pass that fails leaves nothing in
any `.grad`, and one that is repeated adds nothing twice. Under gradient accumulation that holds the gradients of one
pass besides the sum; ``executor="packed"`` does without both.

Ranks that are tied together go on together or not at all. There the error says what to set: forward, `out_of_memory` is
raised in place of torch's own error; backward, within `remedy_named`, which adapters put around the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dta_plugin.execution.memory import halve, is_out_of_memory
from dta_plugin.execution.packed import EdgeOutputs, run_packed
from dta_plugin.execution.streaming.autograd import run_streamed, streamed_gradients
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.execution.streaming.chunk_runner import StreamedJob
from dta_plugin.execution.streaming.chunking import plan_chunks
from dta_plugin.execution.streaming.recomputation import Autocast, RandomNumbers, plain_checkpointing
from dta_plugin.models.introspection import causal_lm
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree


def run_recoverable(
    model: nn.Module, tree: PrefixTree, edges: ScoredEdges, **options: Any
) -> tuple[EdgeOutputs, ChunkPlan | None]:
    """`run_packed`, or `run_streamed` and its plan where memory does not suffice; options: those of both."""
    random = RandomNumbers.from_model(model, edges.target.device)
    random.remember(0)
    try:
        with plain_checkpointing(causal_lm(model)):
            outputs = run_packed(model, tree, edges, **options)
    except (RuntimeError, MemoryError) as error:
        budget = _half(model, tree, error)
    else:
        if not outputs.logprobs.requires_grad:
            return outputs, None
        run = _PackedRun(model, tree, edges, options, random, outputs)
        values = [x for x in (outputs.logprobs, outputs.entropies) if x is not None]
        found = _Recoverable.apply(run, len(values), *(x.detach() for x in values), *run.parameters.values())
        entropies = found[1] if outputs.entropies is not None else None
        return EdgeOutputs(found[0], entropies, None, outputs.backend), None
    return run_streamed(model, tree, edges, budget, **options)


def _half(model: nn.Module, tree: PrefixTree, error: Exception) -> int:
    """Half of the tree's tokens, as budget from now on. Raises `error` where it is another one, or nothing is left."""
    budget = halve(causal_lm(model), tree.tree_tokens) if is_out_of_memory(error) else None
    if budget is None:
        raise error
    return budget


def out_of_memory(tokens: int, obstacle: str | None, when: str = "") -> torch.OutOfMemoryError:
    """The error of a tree in one call that cannot go on in chunks by itself. obstacle: to streaming, where there is."""
    what = f"Out of memory {when}with a tree of {tokens} tokens in one call"
    if obstacle is not None:
        return torch.OutOfMemoryError(f"{what}, which cannot be streamed: {obstacle}. Use smaller micro-batches.")
    return torch.OutOfMemoryError(
        f"{what}. One rank cannot begin anew alone where ranks train together: set max_tree_tokens_per_chunk below "
        f"{tokens}, or executor='streamed'."
    )


# (tokens, obstacle) of the tree that goes backward next, per model: of those that cannot go on in chunks by themselves.
_trees: WeakKeyDictionary[nn.Module, tuple[int, str | None]] = WeakKeyDictionary()


def remember_tree(model: nn.Module, tokens: int, obstacle: str | None) -> None:
    """What goes backward next through the model is such a tree."""
    _trees[causal_lm(model)] = tokens, obstacle


def forget_tree(model: nn.Module) -> None:
    """It is something else."""
    for base in [base for base in _trees if any(base is module for module in model.modules())]:
        del _trees[base]


@contextmanager
def remedy_named(model: nn.Module) -> Iterator[None]:
    """Within the context, a backward pass through such a tree that runs out of memory raises an error with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        tree = next((tree for base, tree in _trees.items() if any(base is module for module in model.modules())), None)
        if tree is None or not is_out_of_memory(error):
            raise
        raise out_of_memory(*tree, "backward ") from error
    finally:
        forget_tree(model)


class _PackedRun:
    """A packed tree on its way backward."""

    def __init__(
        self,
        model: nn.Module,
        tree: PrefixTree,
        edges: ScoredEdges,
        options: dict[str, Any],
        random: RandomNumbers,
        outputs: EdgeOutputs,
    ) -> None:
        self.model, self.tree, self.edges, self.options, self.random = model, tree, edges, options, random
        self.outputs: EdgeOutputs | None = outputs
        self.autocast = Autocast.now(edges.target.device.type)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def backward(self, *seeds: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Gradients of the parameters from those of log-probs and entropies [E], None for what no loss has read."""
        try:
            return self._through_graph(seeds)
        except (RuntimeError, MemoryError) as error:
            if self.random.is_drawn:  # chunks would draw others than those of the log-probs that the caller has
                raise
            budget = _half(self.model, self.tree, error)
        found = streamed_gradients(self._job(), budget, self.autocast, *map(self._filled, (*seeds, None)[:2]))
        return [found.get(name) for name in self.parameters]

    def _through_graph(self, seeds: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        outputs, self.outputs = self.outputs, None
        if outputs is None:  # a second pass, which needs the graph once more
            with (
                torch.enable_grad(),
                self.autocast.entered(),
                self.random.again(0),
                plain_checkpointing(causal_lm(self.model)),
            ):
                outputs = run_packed(self.model, self.tree, self.edges, **self.options)
        values = (outputs.logprobs, outputs.entropies)
        read = [(x, seed) for x, seed in zip(values, seeds, strict=False) if x is not None and seed is not None]
        roots, gradients = zip(*read, strict=True)
        return list(torch.autograd.grad(roots, list(self.parameters.values()), gradients, allow_unused=True))

    def _filled(self, seed: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(self.edges.target), device=self.edges.target.device) if seed is None else seed

    def _job(self) -> StreamedJob:
        options = {name: value for name, value in self.options.items() if name != "allow_nonfinite"}
        base = causal_lm(self.model)
        return StreamedJob(
            self.model, base, is_sharded=False, tree=self.tree, edges=self.edges, planner=plan_chunks, **options
        )


class _Recoverable(torch.autograd.Function):
    """Log-probs, and entropies where there are any, as functions of all parameters."""

    @staticmethod
    def forward(ctx: Any, run: _PackedRun, count: int, *tensors: torch.Tensor):
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seeds):
        return None, None, *(None for _ in seeds), *ctx.run.backward(*seeds)
