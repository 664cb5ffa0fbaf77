"""Hidden states on their way through a model, of its own path or of a tree, and the first layer where both part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.execution.packed import run_packed
from dta_plugin.execution.probing.rounding_noise import Gap, is_routed, noise_seeds, perturbed_embeddings, rounding_unit
from dta_plugin.execution.streaming.autograd import run_streamed
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.layers import attention_modules
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree

# Runs a tree and says, int64 [T], which layout index every token had in the order of the calls.
TreeRun = Callable[[], np.ndarray]


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """Within the context, what each of the modules returns is kept, call by call, as [tokens, H] without graph."""
    calls: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep_in(kept: list[torch.Tensor]) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            output = getattr(output, "last_hidden_state", output)
            states = output[0] if isinstance(output, tuple) else output
            kept.append(states.detach().reshape(-1, states.shape[-1]))

        return keep

    handles = [module.register_forward_hook(keep_in(kept)) for module, kept in zip(modules, calls, strict=True)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def traced(
    model: nn.Module,
    tree: PrefixTree,
    edges: ScoredEdges,
    budget: int | None,
    backend: str,
    images: TreeImages | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Run a tree, streamed in chunks of `budget` tokens or, if None, packed.

    Returns log-probs [E], and the layout indices [T] in the order in which the model was given the tokens.
    """
    if budget is None:
        output = run_packed(model, tree, edges, images=images, backend=backend)
        return output.logprobs, np.arange(tree.tree_tokens)
    output, plan = run_streamed(model, tree, edges, budget, images=images, backend=backend)
    return output.logprobs, np.concatenate([chunk.tokens for chunk in plan.chunks])


def in_layout_order(calls: list[torch.Tensor], order: np.ndarray) -> torch.Tensor:
    """[T, H] of the tree's tokens, from what `recorded` kept. order: as a `TreeRun` returns it."""
    states = torch.cat(calls)[-len(order) :]  # out of memory, a run begins anew
    return torch.empty_like(states).index_copy_(0, torch.from_numpy(order).to(states.device), states)


def state_gaps(states: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """|x - y| / |y| per token, [tokens]."""
    x, y = states.double(), others.double()
    return (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


def first_difference(
    model: PreTrainedModel, paths: np.ndarray, run_own: Callable[[], Any], run_tree: TreeRun
) -> int | None:
    """The first layer whose output in the tree differs from the model's own by more than rounding; None if none does.

    paths: int64 [N] layout index of every token of every row. run_own: runs these rows one after the other.
    """
    layers = decoder_layers(model)
    if not layers:
        return None
    with recorded(layers) as own:
        run_own()
    noisy = []
    for seed in noise_seeds(model, len(paths)):
        with recorded(layers) as moved, perturbed_embeddings(model, seed):
            run_own()
        noisy.append(moved)
    with recorded(layers) as tree:
        order = run_tree()
    routed, unit = is_routed(model), rounding_unit(model)
    rows = torch.from_numpy(paths).to(own[0][0].device)
    if any(len(calls) != len(own[0]) for calls in own):  # layers that are called more than once have no order
        return None
    if any(sum(map(len, calls)) != len(paths) for calls in own):  # or return several states per token
        return None
    for index, mine in enumerate(own):
        expected = torch.cat(mine)
        noise = Gap.largest(
            [Gap.from_differences(state_gaps(torch.cat(moved[index]), expected), routed) for moved in noisy]
        )
        gap = Gap.from_differences(state_gaps(in_layout_order(tree[index], order)[rows], expected), routed)
        if not gap.is_within(noise, unit):
            return index
    return None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in order: the list of modules that every attention module is part of."""
    attention = set(attention_modules(model).values())
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and attention <= set(module.modules()):
            return list(module)
    return []
