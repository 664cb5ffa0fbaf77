"""Decide how a batch runs, run it, and say what was done: the one entry for `sequence_logprobs` and the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedModelError
from dta_plugin.execution.dense import dense_logprobs
from dta_plugin.execution.model import causal_lm, input_device, model_cost
from dta_plugin.execution.packed import run_packed
from dta_plugin.execution.support import unsupported_reason
from dta_plugin.tree.cost import CostEstimate, estimate
from dta_plugin.tree.layout import Scored, ScoredEdges
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.split import split_by_tokens
from dta_plugin.tree.trie import PrefixTree, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLogProbs:
    """Result of `sequence_logprobs`, one tensor of length len - 1 per sequence; entry i belongs to token i + 1.

    logprobs: log p(token i + 1 | tokens ..i), differentiable, 0 where unscored.
    entropies: entropy in nats of the distribution that token i + 1 was drawn from, or None.
    router_loss: MoE load-balancing loss of the flat batch, or None. report: what was shared and how it ran.
    """

    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor] | None
    router_loss: torch.Tensor | None
    report: TreeReport


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch that is ready to run: its tree, what is scored, and the decision with its reason."""

    sequences: list[TokenSequence]
    scored: Scored | None
    tree: PrefixTree
    edges: ScoredEdges
    cost: CostEstimate
    use_tree: bool
    reason: str


def prepare(model: nn.Module, sequences: Sequence[TokenSequence], scored: Scored | None, config: TreeConfig) -> Batch:
    """Build the tree and decide between tree and dense.

    Raises InvalidInputError for unusable sequences, UnsupportedModelError where the tree would not be exact and
    ``config.on_unsupported == "error"``.
    """
    tree = PrefixTree.from_sequences(sequences)
    reason = unsupported_reason(model)
    if reason is not None and config.on_unsupported == "error":
        raise UnsupportedModelError(f"Prefix-tree execution is not exact here: {reason}; or on_unsupported='dense'.")
    base = causal_lm(model)
    _check_vocabulary(tree, base)
    edges = ScoredEdges.from_tree(tree, scored, input_device(base))
    scored_tokens = int((edges.edge_of_token < len(edges.target)).sum())
    cost = estimate(tree, model_cost(base), scored_tokens, len(edges.rows))
    use_tree = reason is None and cost.saving >= config.min_saving
    if reason is None:
        gate = f", min_saving {config.min_saving:.0%}" if config.min_saving else ""
        saved = f"{cost.saving:.0%} of dense FLOPs saved{gate}"
        reason = saved if use_tree else f"only {saved}"
    return Batch(list(sequences), scored, tree, edges, cost, use_tree, reason)


def _check_vocabulary(tree: PrefixTree, model: PreTrainedModel) -> None:
    size = model.config.get_text_config().vocab_size
    if tree.tokens.max() >= size:
        raise InvalidInputError(
            f"The batch has token id {tree.tokens.max()}. Expected ids below the model's vocab_size {size}; check that "
            "the tokenizer belongs to the model."
        )


def run_tree(
    model: nn.Module,
    batch: Batch,
    config: TreeConfig,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_router_loss: bool = False,
    head_dtype: torch.dtype | None = None,
) -> SequenceLogProbs:
    """Run the batch as a tree, in as many chunks as `max_tree_tokens_per_chunk` asks for."""
    budget = config.max_tree_tokens_per_chunk
    if budget is not None and _is_sharded(model):
        raise InvalidInputError(
            f"max_tree_tokens_per_chunk={budget} with a model that FSDP2 shards over several ranks. Expected None "
            "there: ranks with different numbers of chunks would wait for each other forever; lower the batch size."
        )
    if budget is None or return_router_loss:  # the router loss is a product of sums over the whole batch
        chunks = [(np.arange(batch.tree.num_sequences), batch.tree, batch.edges)]
    else:
        chunks = [_chunk(batch, group) for group in split_by_tokens(batch.tree, budget)]
    logprobs: dict[int, torch.Tensor] = {}
    entropies: dict[int, torch.Tensor] = {}
    router_loss = None
    outputs = run_packed(
        model,
        [(tree, edges) for _, tree, edges in chunks],
        backend=config.backend,
        temperature=temperature,
        return_entropy=return_entropy,
        return_router_loss=return_router_loss,
        head_dtype=head_dtype,
    )
    for (group, _, edges), output in zip(chunks, outputs, strict=True):
        logprobs.update(zip(group, edges.per_sequence(output.logprobs), strict=True))
        if output.entropies is not None:
            entropies.update(zip(group, edges.per_sequence(output.entropies), strict=True))
        router_loss = output.router_loss
    report = TreeReport(
        tree=batch.tree,
        chunks=len(chunks),
        executor="packed",
        backend=outputs[0].backend,
        reason=batch.reason,
        ceiling=batch.cost.ceiling,
    )
    order = range(batch.tree.num_sequences)
    return SequenceLogProbs(
        [logprobs[s] for s in order],
        [entropies[s] for s in order] if return_entropy else None,
        router_loss,
        report,
    )


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks gather this model's weights from each other in every call."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(isinstance(module, FSDPModule) for module in model.modules())


def run_dense(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, return_entropy: bool = False
) -> SequenceLogProbs:
    """Run the batch through the unmodified model, one sequence at a time."""
    device = batch.edges.target.device
    rows = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in batch.sequences]
    logprobs, entropies = dense_logprobs(model, rows, temperature, return_entropy)
    unscored = (batch.edges.edge_of_token == len(batch.edges.target)).split(batch.edges.lengths)
    logprobs = [value.masked_fill(mask, 0.0) for value, mask in zip(logprobs, unscored, strict=True)]
    if entropies is not None:
        entropies = [value.masked_fill(mask, 0.0) for value, mask in zip(entropies, unscored, strict=True)]
    report = TreeReport(
        tree=batch.tree,
        chunks=len(rows),
        executor="dense",
        backend=causal_lm(model).config._attn_implementation,
        reason=batch.reason,
        ceiling=batch.cost.ceiling,
    )
    return SequenceLogProbs(logprobs, entropies, None, report)


def _chunk(batch: Batch, group: np.ndarray) -> tuple[np.ndarray, PrefixTree, ScoredEdges]:
    tree = PrefixTree.from_sequences([batch.sequences[s] for s in group])
    scored = None if batch.scored is None else [batch.scored[s] for s in group]
    return group, tree, ScoredEdges.from_tree(tree, scored, batch.edges.target.device)
