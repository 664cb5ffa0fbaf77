"""Run a batch by the executor that suits it, and say what was done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dta_plugin.attention.api import serving_backend
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.dense import dense_logprobs
from dta_plugin.execution.memory import token_budget
from dta_plugin.execution.packed import EdgeOutputs, run_packed
from dta_plugin.execution.prepared_batch import DUMMY_SEQUENCE, PreparedBatch, SequenceLogProbs
from dta_plugin.execution.probing.probe import probe
from dta_plugin.execution.ranks import gathered, has_tensor_parallel, is_collective, is_fsdp1, is_sharded, is_zero3
from dta_plugin.execution.streaming.autograd import run_streamed
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.models.introspection import attention_kinds, causal_lm
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.split import split_by_tokens
from dta_plugin.tree.trie import PrefixTree


def run_tree(
    model: nn.Module,
    batch: PreparedBatch,
    config: TreeConfig,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_router_loss: bool = False,
    head_dtype: torch.dtype | None = None,
) -> SequenceLogProbs:
    """Run the batch as a tree: packed where it fits the token budget, else streamed (see `TreeConfig.executor`).

    Raises InvalidInputError where the executor that the config asks for cannot do what is wanted, UnsupportedError
    where it gives other log-probs than the model.
    """
    options: dict[str, Any] = {"backend": config.backend, "temperature": temperature, "head_dtype": head_dtype}
    budget = _stream_budget(model, batch, config, return_router_loss)
    if budget is not None:
        output, plan = run_streamed(model, batch.tree, batch.edges, budget, return_entropy=return_entropy, **options)
        return _result(batch, output, return_entropy, plan)
    split_budget = None if return_router_loss else _split_budget(model, batch, config)
    if split_budget is not None:
        return _run_split(model, batch, split_budget, return_entropy, options)
    chunk = [(batch.tree, batch.edges)]
    (output,) = run_packed(
        model, chunk, return_entropy=return_entropy, return_router_loss=return_router_loss, **options
    )
    return _result(batch, output, return_entropy)


def _stream_budget(model: nn.Module, batch: PreparedBatch, config: TreeConfig, return_router_loss: bool) -> int | None:
    """Tokens per chunk if the batch is to be streamed, None if it is to run packed."""
    device = batch.edges.target.device
    if config.executor == "packed":
        _probed(model, config, ["packed"], device)
        return None
    obstacle = _streaming_obstacle(model, batch, config, return_router_loss)
    if config.executor == "streamed":
        if obstacle is not None:
            raise InvalidInputError(
                f"executor='streamed' with {obstacle}. Use executor='auto', which runs such batches packed."
            )
        _probed(model, config, ["streamed"], device)
    else:
        reasons = _probed(model, config, ["packed", *["streamed"] * (obstacle is None)], device)
        if obstacle is not None or reasons.get("streamed") is not None:
            return None
    budget = token_budget(causal_lm(model), device, config.max_tree_tokens_per_chunk)
    streams = config.executor == "streamed" or batch.tree.tree_tokens > budget
    if is_sharded(model):  # all ranks do the same, because all must call the model equally often
        streams = any(gathered(model, streams))
    return budget if streams else None


def _probed(model: nn.Module, config: TreeConfig, executors: list[str], device: torch.device) -> dict[str, str | None]:
    """Per executor, why it may not run after all. Raises UnsupportedError if the first one may not."""
    if config.probe == "off":
        return {}
    reasons = probe(model, executors, config.backend, device)
    first = reasons[executors[0]]
    if first is not None:
        raise UnsupportedError(first)
    return reasons


def _streaming_obstacle(
    model: nn.Module, batch: PreparedBatch, config: TreeConfig, return_router_loss: bool
) -> str | None:
    if return_router_loss:
        return "a router loss, which needs the whole batch at once"
    if is_fsdp1(model):
        return "a model that FSDP1 shards; FSDP2 (fully_shard) can stream"
    if has_tensor_parallel(model):
        return "tensor-parallel parameters, which this version cannot stream"
    if is_zero3(model):
        return "a model that DeepSpeed ZeRO-3 shards; FSDP2, or ZeRO-1 or 2, can stream"
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        return f"a gradient hook on {hooked[0]}; register_post_accumulate_grad_hook sees what is summed over chunks"
    try:
        kinds = attention_kinds(causal_lm(model), batch.edges.target.device)
    except Exception as error:
        return f"attention whose sizes cannot be read ({type(error).__name__}: {error})"
    backends = {serving_backend(config.backend, kind) for kind in kinds} - {"cpu", "triton"}
    if backends:
        return f"attention through backend {backends.pop()!r}: streaming needs 'cpu' or 'triton'"
    return None


def _split_budget(model: nn.Module, batch: PreparedBatch, config: TreeConfig) -> int | None:
    """Tokens per tree if packed execution has to cut the batch, None if the batch may stay whole."""
    budget = config.max_tree_tokens_per_chunk
    if budget is None:
        return None
    exceeds = batch.tree.tree_tokens > budget
    if (is_sharded(model) or is_zero3(model)) and any(exceeding := gathered(model, exceeds)) and len(exceeding) > 1:
        raise InvalidInputError(
            f"max_tree_tokens_per_chunk={budget} and a batch of more tree tokens, run packed on a model whose weights "
            "are sharded. Expected FSDP2 with executor='auto' or 'streamed' there: several trees would make ranks call "
            "the model differently often, and wait for each other forever."
        )
    return budget if exceeds else None


def _run_split(
    model: nn.Module, batch: PreparedBatch, budget: int, return_entropy: bool, options: dict[str, Any]
) -> SequenceLogProbs:
    """Packed execution of a large batch: several trees, each of at most `budget` tokens where a sequence allows it."""
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
    rows = [logprobs[s] for s in order]
    return SequenceLogProbs(rows, [entropies[s] for s in order] if return_entropy else None, None, report, _zero(rows))


def _result(
    batch: PreparedBatch, output: EdgeOutputs, return_entropy: bool, plan: ChunkPlan | None = None
) -> SequenceLogProbs:
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
    logprobs = batch.edges.per_sequence(output.logprobs) if batch.sequences else []
    entropies = batch.edges.per_sequence(output.entropies) if output.entropies is not None and batch.sequences else []
    anchor = _zero([output.logprobs])
    return SequenceLogProbs(logprobs, entropies if return_entropy else None, output.router_loss, report, anchor)


def _zero(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """0, differentiable in what `values` are differentiable in."""
    return 0.0 * torch.stack([x.sum() for x in values]).sum() if values else torch.zeros(())


def _report(
    batch: PreparedBatch,
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
        reason=batch.reason if batch.sequences else "no sequences here, runs along with the other ranks",
        ceiling=batch.cost.ceiling,
        peak_tokens=peak,
        recomputed_tokens=recomputed + rebuilt,
    )


def run_dense(
    model: nn.Module, batch: PreparedBatch, *, temperature: float = 1.0, return_entropy: bool = False
) -> SequenceLogProbs:
    """Run the batch through the unmodified model, one sequence at a time."""
    device = batch.edges.target.device
    count = len(batch.sequences)
    calls = max(gathered(model, count)) if is_collective(model) else count
    sequences = [*batch.sequences, *[DUMMY_SEQUENCE] * (calls - count)]
    rows = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
    temperatures = [temperature] * count if batch.temperatures is None else list(batch.temperatures)
    temperatures += [1.0] * (calls - count)
    logprobs, entropies = dense_logprobs(model, rows, temperatures, return_entropy)
    anchor = _zero(logprobs)
    unscored = (batch.edges.edge_of_token == len(batch.edges.target)).split(batch.edges.lengths)
    # The anchor makes the stand-ins go backward with the others.
    logprobs = [anchor + v.masked_fill(mask, 0.0) for v, mask in zip(logprobs[:count], unscored, strict=False)]
    if entropies is not None:
        entropies = [v.masked_fill(mask, 0.0) for v, mask in zip(entropies[:count], unscored, strict=False)]
    report = _report(batch, "dense", causal_lm(model).config._attn_implementation, len(rows))
    return SequenceLogProbs(logprobs, entropies, None, report, anchor)


def _chunk(batch: PreparedBatch, group: np.ndarray) -> tuple[PrefixTree, ScoredEdges]:
    tree = PrefixTree.from_sequences([batch.sequences[s] for s in group])
    scored = None if batch.scored is None else [batch.scored[s] for s in group]
    temperatures = None if batch.temperatures is None else [batch.temperatures[s] for s in group]
    return tree, ScoredEdges.from_tree(tree, scored, batch.edges.target.device, temperatures)
