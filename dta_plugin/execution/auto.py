"""Run a batch by the executor that suits it, and say what was done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dta_plugin.attention.api import serving_backend
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.dense import dense_logprobs
from dta_plugin.execution.memory import is_out_of_memory, token_budget
from dta_plugin.execution.packed import EdgeOutputs, run_packed
from dta_plugin.execution.prepared_batch import PreparedBatch, SequenceLogProbs
from dta_plugin.execution.probing.forest import image_forest
from dta_plugin.execution.probing.probe import probe
from dta_plugin.execution.rank_images import dense_turns
from dta_plugin.execution.ranks import (
    gathered,
    has_tensor_parallel,
    is_collective,
    is_fsdp,
    is_fsdp1,
    is_sharded,
    is_zero3,
)
from dta_plugin.execution.recovery import forget_tree, out_of_memory, remember_tree, run_recoverable
from dta_plugin.execution.streaming.autograd import run_streamed
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from dta_plugin.models.introspection import attention_kinds, causal_lm
from dta_plugin.models.layers import attention_modules, chunk_size
from dta_plugin.models.vision.dense import dense_inputs
from dta_plugin.tree.report import TreeReport


def run_tree(
    model: nn.Module,
    batch: PreparedBatch,
    config: TreeConfig,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_router_loss: bool = False,
    head_dtype: torch.dtype | None = None,
    has_scaler: bool = False,
) -> SequenceLogProbs:
    """Run the batch as a tree: packed where it fits the token budget, else streamed (see `TreeConfig.executor`).

    has_scaler: a loss scaler will skip the step if gradients are not finite (see `TreeConfig.on_nonfinite`).

    Raises InvalidInputError where the executor that the config asks for cannot do what is asked for, UnsupportedError
    where it gives other log-probs than the model.
    """
    options: dict[str, Any] = {
        "images": batch.images,
        "backend": config.backend,
        "temperature": temperature,
        "head_dtype": head_dtype,
        "return_entropy": return_entropy,
        "allow_nonfinite": config.on_nonfinite == "pass" or (config.on_nonfinite == "auto" and has_scaler),
    }
    forget_tree(model)
    budget, obstacle = _stream_budget(model, batch, config, return_router_loss)
    if budget is not None:
        return _result(batch, *run_streamed(model, batch.tree, batch.edges, budget, **options), return_entropy)
    if config.executor == "auto" and obstacle is None and not is_collective(model):
        output, plan = run_recoverable(model, batch.tree, batch.edges, **options)
        if plan is not None:
            batch = batch.with_reason(f"{batch.decision.reason}; out of memory in one call")
        return _result(batch, output, plan, return_entropy)
    if obstacle is not None and batch.tree.tree_tokens > (config.max_tree_tokens_per_chunk or math.inf):
        knob = f"max_tree_tokens_per_chunk={config.max_tree_tokens_per_chunk}"
        batch = batch.with_reason(f"{batch.decision.reason}; {knob} is not kept: {obstacle}")
    try:
        output = run_packed(model, batch.tree, batch.edges, return_router_loss=return_router_loss, **options)
    except (RuntimeError, MemoryError) as error:
        if config.executor == "packed" or not is_out_of_memory(error):
            raise
        raise out_of_memory(batch.tree.tree_tokens, obstacle) from error
    if config.executor != "packed" and torch.is_grad_enabled():
        remember_tree(model, batch.tree.tree_tokens, obstacle)
    return _result(batch, output, None, return_entropy)


def _stream_budget(
    model: nn.Module, batch: PreparedBatch, config: TreeConfig, return_router_loss: bool
) -> tuple[int | None, str | None]:
    """Tokens per chunk if the batch is to be streamed, None if it is to run packed.

    And what keeps a batch from being streamed, where the executor is chosen here.
    """
    device = batch.edges.target.device
    if config.executor == "packed":
        _probed(model, config, ["packed"], device, batch)
        return None, "executor='packed'"
    obstacle = _streaming_obstacle(model, batch, config, return_router_loss)
    if config.executor == "streamed":
        if obstacle is not None:
            raise InvalidInputError(
                f"executor='streamed' with {obstacle}. Use executor='auto', which runs such batches packed."
            )
        _probed(model, config, ["streamed"], device, batch)
    else:
        obstacles = _probed(model, config, ["packed", *["streamed"] * (obstacle is None)], device, batch)
        obstacle = obstacle or obstacles.get("streamed")
        if obstacle is not None:
            return None, obstacle
    budget = token_budget(causal_lm(model), device, config.max_tree_tokens_per_chunk)
    streams = config.executor == "streamed" or batch.tree.tree_tokens > budget
    if is_sharded(model):  # all ranks do the same, because all must call the model equally often
        streams = any(gathered(model, streams))
    return budget if streams else None, None


def _probed(
    model: nn.Module, config: TreeConfig, executors: list[str], device: torch.device, batch: PreparedBatch
) -> dict[str, str | None]:
    """Per executor, what keeps it from running after all. Raises UnsupportedError if the first one may not."""
    if config.probe == "off":
        return {}
    rows = batch.image_rows
    # Ranks that shard the model do the same, whether their own rows have images or a blank one stands in.
    has_images = batch.images is not None if is_fsdp(model) else rows is not None
    sample = (lambda: image_forest(causal_lm(model), batch.sequences, rows or [])) if has_images else None
    images = 0 if batch.images is None else batch.images.most_per_row
    obstacles = probe(model, executors, config.backend, device, sample, images)
    first = obstacles[executors[0]]
    if first is not None:
        raise UnsupportedError(first)
    return obstacles


def _streaming_obstacle(
    model: nn.Module, batch: PreparedBatch, config: TreeConfig, return_router_loss: bool
) -> str | None:
    base = causal_lm(model)
    if return_router_loss:
        return "a router loss, which needs the whole batch at once"
    if is_fsdp1(model):
        return "a model that FSDP1 shards; FSDP2 (fully_shard) can stream"
    if has_tensor_parallel(model):
        return "tensor-parallel parameters, which this version cannot stream"
    if batch.images is not None and is_sharded(model):
        return "images and a model that FSDP2 shards"
    if is_zero3(model):
        return "a model that DeepSpeed ZeRO-3 shards; FSDP2, or ZeRO-1 or 2, can stream"
    ranges = [chunk_size(base.config.get_text_config(), layer) for layer in attention_modules(base)]
    longest = int(batch.tree.depth.max()) + 1
    if any(chunk is not None and chunk < longest for chunk in ranges):
        return f"attention in ranges of {max(filter(None, ranges))} positions, and a row of {longest} tokens"
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        return f"a gradient hook on {hooked[0]}; register_post_accumulate_grad_hook sees what is summed over chunks"
    try:
        kinds = attention_kinds(base, batch.edges.target.device)
    except Exception as error:
        return f"attention whose sizes cannot be read ({type(error).__name__}: {error})"
    backends = {serving_backend(config.backend, kind) for kind in kinds} - {"cpu", "triton"}
    if backends:
        return f"attention through backend {backends.pop()!r}: streaming needs 'cpu' or 'triton'"
    return None


def _result(
    batch: PreparedBatch, output: EdgeOutputs, plan: ChunkPlan | None, return_entropy: bool
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
        reason=batch.decision.reason if batch.sequences else "no sequences here, runs along with the other ranks",
        cost=batch.decision.flops,
        seconds=batch.decision.seconds,
        peak_tokens=peak,
        recomputed_tokens=recomputed + rebuilt,
    )


def run_dense(
    model: nn.Module, batch: PreparedBatch, *, temperature: float = 1.0, return_entropy: bool = False
) -> SequenceLogProbs:
    """Run the batch through the unmodified model, one sequence at a time."""
    device, own = batch.edges.target.device, batch.temperatures_or(temperature)
    turns = dense_turns(model, batch.rows())
    places = [place for place, _ in turns]
    rows = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for _, (sequence, _) in turns]
    images = dense_inputs(causal_lm(model), rows, [images for _, (_, images) in turns])
    temperatures = [1.0 if place is None else own[place] for place in places]
    logprobs, entropies = dense_logprobs(model, rows, temperatures, return_entropy, images=images)
    anchor = _zero(logprobs)
    order = [places.index(place) for place in range(len(batch.sequences))]
    unscored = batch.unscored()
    # The anchor makes the dummies go backward with the others.
    logprobs = [anchor + logprobs[i].masked_fill(mask, 0.0) for i, mask in zip(order, unscored, strict=False)]
    if entropies is not None:
        entropies = [entropies[i].masked_fill(mask, 0.0) for i, mask in zip(order, unscored, strict=False)]
    report = _report(batch, "dense", causal_lm(model).config._attn_implementation, len(rows))
    return SequenceLogProbs(logprobs, entropies, None, report, anchor)
