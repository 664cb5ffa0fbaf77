"""Decide how a batch runs, run it, and say what was done: the one entry for `sequence_logprobs` and the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from dta_plugin.attention.api import resolve_backend
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedModelError
from dta_plugin.execution.dense import dense_logprobs
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.model import causal_lm, head_dim, input_device, model_cost
from dta_plugin.execution.packed import EdgeOutputs, run_packed
from dta_plugin.execution.streamed import run_streamed
from dta_plugin.execution.support import unsupported_reason
from dta_plugin.tree.cost import CostEstimate, estimate
from dta_plugin.tree.layout import Scored, ScoredEdges
from dta_plugin.tree.plan import Plan
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
    """Run the batch as a tree: packed where it fits the token budget, else streamed (see `TreeConfig.executor`).

    Raises InvalidInputError where the executor that the config asks for cannot do what is wanted.
    """
    options: dict[str, Any] = {"backend": config.backend, "temperature": temperature, "head_dtype": head_dtype}
    budget = _stream_budget(model, batch, config, return_router_loss)
    if budget is not None:
        output, plan = run_streamed(model, batch.tree, batch.edges, budget, return_entropy=return_entropy, **options)
        return _result(batch, output, return_entropy, plan)
    if config.max_tree_tokens_per_chunk is not None and not return_router_loss:
        return _run_split(model, batch, config.max_tree_tokens_per_chunk, return_entropy, options)
    chunk = [(batch.tree, batch.edges)]
    (output,) = run_packed(
        model, chunk, return_entropy=return_entropy, return_router_loss=return_router_loss, **options
    )
    return _result(batch, output, return_entropy)


def _stream_budget(model: nn.Module, batch: Batch, config: TreeConfig, return_router_loss: bool) -> int | None:
    """Tokens per chunk if the batch is to be streamed, None if it is to run packed."""
    if config.executor == "packed":
        return None
    obstacle = _obstacle_to_streaming(model, batch, config, return_router_loss)
    if obstacle is not None:
        if config.executor == "streamed":
            raise InvalidInputError(
                f"executor='streamed' with {obstacle}. Use executor='auto', which runs such batches packed."
            )
        return None
    budget = token_budget(causal_lm(model), batch.edges.target.device, config.max_tree_tokens_per_chunk)
    if config.executor == "auto" and batch.tree.tree_tokens <= budget:
        return None
    return budget


def _obstacle_to_streaming(model: nn.Module, batch: Batch, config: TreeConfig, return_router_loss: bool) -> str | None:
    if return_router_loss:
        return "a router loss, which needs the whole batch at once"
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return "a model that FSDP shards, which this version cannot stream"
    base = causal_lm(model)
    backend = resolve_backend(config.backend, batch.edges.target.device, base.dtype, (head_dim(base),))
    if backend not in ("cpu", "triton"):
        return f"attention through backend {backend!r}: streaming needs 'cpu' or 'triton'"
    return None


def _run_split(
    model: nn.Module, batch: Batch, budget: int, return_entropy: bool, options: dict[str, Any]
) -> SequenceLogProbs:
    """Packed execution of a large batch: several trees, each of at most `budget` tokens where a sequence allows it."""
    if _is_sharded(model):
        raise InvalidInputError(
            f"max_tree_tokens_per_chunk={budget} with a model that FSDP2 shards over several ranks. Expected None "
            "there: ranks with different numbers of chunks would wait for each other forever; lower the batch size."
        )
    groups = split_by_tokens(batch.tree, budget)
    chunks = [_chunk(batch, group) for group in groups]
    outputs = run_packed(model, chunks, return_entropy=return_entropy, **options)
    logprobs: dict[int, torch.Tensor] = {}
    entropies: dict[int, torch.Tensor] = {}
    for group, (_, edges), output in zip(groups, chunks, outputs, strict=True):
        logprobs.update(zip(group, edges.per_sequence(output.logprobs), strict=True))
        if output.entropies is not None:
            entropies.update(zip(group, edges.per_sequence(output.entropies), strict=True))
    order = range(batch.tree.num_sequences)
    backends = {backend for output in outputs for backend in output.backend.split("+")}
    report = _report(batch, "packed", "+".join(sorted(backends)), len(chunks))
    return SequenceLogProbs(
        [logprobs[s] for s in order], [entropies[s] for s in order] if return_entropy else None, None, report
    )


def _result(batch: Batch, output: EdgeOutputs, return_entropy: bool, plan: Plan | None = None) -> SequenceLogProbs:
    """plan: what was streamed, None for packed execution."""
    if plan is None:
        report = _report(batch, "packed", output.backend, chunks=1)
    else:
        report = _report(
            batch,
            "streamed",
            output.backend,
            len(plan.chunks),
            plan.peak_tokens,
            plan.recomputed_tokens,
            plan.rebuilt_tokens,
        )
    entropies = None if output.entropies is None else batch.edges.per_sequence(output.entropies)
    logprobs = batch.edges.per_sequence(output.logprobs)
    return SequenceLogProbs(logprobs, entropies if return_entropy else None, output.router_loss, report)


def _report(
    batch: Batch,
    executor: str,
    backend: str,
    chunks: int,
    peak: int | None = None,
    recomputed: int = 0,
    rebuilt: int = 0,
) -> TreeReport:
    return TreeReport(
        tree=batch.tree,
        chunks=chunks,
        executor=executor,
        backend=backend,
        reason=batch.reason,
        ceiling=batch.cost.ceiling,
        peak_tokens=peak,
        recomputed_tokens=recomputed + rebuilt,
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
    report = _report(batch, "dense", causal_lm(model).config._attn_implementation, len(rows))
    return SequenceLogProbs(logprobs, entropies, None, report)


def _chunk(batch: Batch, group: np.ndarray) -> tuple[PrefixTree, ScoredEdges]:
    tree = PrefixTree.from_sequences([batch.sequences[s] for s in group])
    scored = None if batch.scored is None else [batch.scored[s] for s in group]
    return tree, ScoredEdges.from_tree(tree, scored, batch.edges.target.device)
