"""Run by test_ranks.py under torchrun, one process per rank: streamed execution under DDP and FSDP2.

torchrun --nproc-per-node 2 -m tests.execution.streaming.ranks_script <folder> <job:argument> ...

Each rank saves what the jobs returned, by their texts, as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.execution.streaming.chunk_runner import ChunkGraph
from dta_plugin.execution.streaming.streamed_run import StreamedRun
from tests.support.models import VOCABULARY, norm_in_own_dtype, softmax_in_own_dtype, tiny_model
from tests.support.oracle import functional
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.trees import Sequences, binary, branching_comb, run, star

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
Batches = list[Sequences]  # one per rank


def plain(family: str = "qwen3", **changes: Any) -> nn.Module:
    return tiny_model(family, torch.float64, **changes).train()


def with_lora(family: str = "qwen3") -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(plain(family), LORA).double()


def with_convolutions() -> nn.Module:
    model = random_causal_lm(config_of("lfm2", vocab_size=VOCABULARY))
    norm_in_own_dtype(model)
    return model.double()


def with_delta_rules() -> nn.Module:
    """In float32, as transformers computes them; adapters on their projections, too."""
    model = random_causal_lm(config_of("qwen3_5_text", vocab_size=VOCABULARY, rms_norm_eps=1e-2))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model


def sharded(model: nn.Module, head_alone: bool = False, **options: Any) -> nn.Module:
    """FSDP2 as accelerate sets it up: one unit per decoder layer, the rest in the root's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = [*base.model.layers, *([base.lm_head] if head_alone else [])]
    for unit in units:
        fully_shard(unit, **options)
    return fully_shard(model, **options)


# Per name, the model that is trained and how it is wrapped.
Wrapping = tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]
WRAPPINGS: dict[str, Wrapping] = {
    "ddp": (plain, DistributedDataParallel),
    "ddp, unused parameters looked for": (plain, lambda m: DistributedDataParallel(m, find_unused_parameters=True)),
    "ddp, static graph": (plain, lambda m: DistributedDataParallel(m, static_graph=True)),
    "ddp, LoRA, checkpointing": (lambda: checkpointed(with_lora(), True), DistributedDataParallel),
    "fsdp2": (plain, sharded),
    "fsdp2, weights resharded": (plain, lambda m: sharded(m, reshard_after_forward=True)),
    "fsdp2, weights kept": (plain, lambda m: sharded(m, reshard_after_forward=False)),
    "fsdp2, head alone": (plain, lambda m: sharded(m, head_alone=True)),
    "fsdp2, tied": (lambda: plain("llama", tie_word_embeddings=True), sharded),
    "fsdp2, LoRA": (with_lora, sharded),
    "fsdp2, checkpointing": (lambda: checkpointed(plain(), False), sharded),
    "fsdp2, LoRA, checkpointing": (lambda: checkpointed(with_lora(), True), sharded),
    "fsdp2, experts": (lambda: plain("qwen3_moe"), sharded),
}
if Version(transformers.__version__) >= Version("5.15"):  # before, mixers ask caches differently
    WRAPPINGS |= {
        "ddp, convolutions": (with_convolutions, DistributedDataParallel),
        "fsdp2, convolutions": (with_convolutions, sharded),
        "fsdp2, delta rules, LoRA, checkpointing": (lambda: checkpointed(with_delta_rules(), False), sharded),
    }
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=6)
# Chunks per rank at a budget of 6 tokens: some against one against none.
SPLITS: dict[str, Batches] = {
    "5 and 1": [branching_comb(4), [run(5)]],
    "5 and 0": [branching_comb(4), []],
    "0 and 1": [[], [run(6)]],
    "both": [binary(2), star(9, prefix=7)],
}


def logprobs_and_loss(
    model: nn.Module, sequences: Sequences, first: int, config: TreeConfig
) -> tuple[dta_plugin.SequenceLogProbs, torch.Tensor]:
    """The loss is a sum over sequences, each with weights that come from its number in the union of all batches."""
    out = dta_plugin.sequence_logprobs(model, sequences, config, return_entropy=True)
    rows = zip(out.logprobs, out.entropies or [], strict=True)
    loss = sum((functional([p], [e], seed=first + i) for i, (p, e) in enumerate(rows)), out.anchor.double())
    return out, loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name.removeprefix("module.")] = grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def step(model: nn.Module, batches: Batches, config: TreeConfig) -> tuple[int, dict[str, torch.Tensor]]:
    """-> chunks of this rank, gradients of the mean over ranks, as all ranks see them."""
    rank = distributed.get_rank()
    first = sum(len(batch) for batch in batches[:rank])
    out, loss = logprobs_and_loss(model, batches[rank], first, config)
    loss.backward()
    return out.report.chunks, gradients(model)


def splits(name: str) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """Every split in one training: what one step leaves behind must not harm the next."""
    build, wrap = WRAPPINGS[name]
    model = wrap(build())
    results = {split: step(model, batches, STREAMED) for split, batches in SPLITS.items()}
    auto = TreeConfig(max_tree_tokens_per_chunk=12)  # streams on one rank, would be packed on the other
    return results | {f"{split}, auto": step(model, SPLITS[split], auto) for split in ("5 and 1", "5 and 0")}


def random_batches(generator: random.Random) -> Batches:
    """Sequences that part from earlier ones at random places, dealt out at random; one rank may get none."""
    sequences: Sequences = []
    for number in range(generator.randint(1, 12)):
        base = generator.choice([[], *sequences])
        sequences.append(base[: generator.randint(0, len(base))] + run(generator.randint(1, 8), seed=number))
    cut = generator.choice([0, len(sequences), generator.randint(0, len(sequences))])
    generator.shuffle(sequences)
    return [sequences[:cut], sequences[cut:]]


def random_splits(seeds: str) -> list[tuple[Batches, str, dict[str, torch.Tensor]]]:
    """Random trees under random budgets, all different between ranks, under three wrappings in turn. seeds: "0-36"."""
    wrappings = ["fsdp2", "ddp", "fsdp2, LoRA"]
    models = {name: wrap(build()) for name, (build, wrap) in WRAPPINGS.items() if name in wrappings}
    results = []
    for seed in range(*map(int, seeds.split("-"))):
        generator = random.Random(seed)
        batches, budgets = random_batches(generator), [generator.randint(1, 30) for _ in range(2)]
        executor = generator.choice(["streamed", "auto"])
        budget = budgets[distributed.get_rank()]
        config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
        name = wrappings[seed % len(wrappings)]
        results.append((batches, name, step(models[name], batches, config)[1]))
    return results


def events(name: str) -> list[str]:
    """Of one step, in order: a layer goes backward ("layer 0"), gradients are reduced over ranks ("reduce")."""
    build, wrap = WRAPPINGS[name]
    model, found = wrap(build()), list[str]()
    if isinstance(model, DistributedDataParallel):
        model = DistributedDataParallel(model.module, bucket_cap_mb=0.01)  # several buckets, even of a tiny model
        model.register_comm_hook(None, lambda _, bucket: found.append("reduce") or allreduce_hook(None, bucket))
    for index, layer in enumerate(getattr(model, "module", model).model.layers):
        layer.register_full_backward_pre_hook(lambda *_, index=index: found.append(f"layer {index}"))
    # torch 2.13 calls it by another name than the releases before.
    call = "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    own = getattr(distributed, call)
    with patch.object(distributed, call, lambda *a, **k: found.append("reduce") or own(*a, **k)):
        for _ in range(2):  # DDP finds its buckets in the first step
            found.clear()
            step(model, SPLITS["both"], STREAMED)
    return found


def gathered_units(_: str) -> dict[str, int]:
    """How many of 9 units of an FSDP2 model hold their weights at a time in a backward pass; and after it."""
    most = {}
    for executor in ("packed", "streamed"):
        model, counts = sharded(plain(num_hidden_layers=8), reshard_after_forward=True), list[int]()
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]

        def count(*_: object, units: list[FSDPModule] = units, counts: list[int] = counts) -> None:
            counts.append(sum(not isinstance(p, DTensor) for unit in units for p in list(unit.parameters())[:1]))

        for layer in model.model.layers:
            layer.register_full_backward_pre_hook(count)
            layer.register_forward_pre_hook(count)
        _, loss = logprobs_and_loss(model, SPLITS["both"][0], 0, STREAMED if executor == "streamed" else TreeConfig())
        counts.clear()
        loss.backward()
        most[executor] = max(counts)
        count()
        most[f"{executor}, after"] = counts[-1]
    return most


def failing_chunk(name: str) -> dict[str, Any]:
    """An error in the middle of the backward pass, on both ranks; then the step is tried again."""

    def fail() -> None:
        raise RuntimeError("simulated")

    model, result = broken_off(name, fail)
    return result | {"retry": step(model, SPLITS["both"], STREAMED)}


def killed_rank(name: str) -> dict[str, Any]:
    """Rank 1 dies in the middle of the backward pass."""
    return broken_off(name, lambda: os._exit(9) if distributed.get_rank() == 1 else None)[1]


def broken_off(name: str, action: Callable[[], None]) -> tuple[nn.Module, dict[str, Any]]:
    """The model, the error's message, and the parameters with a gradient after `action` in the second chunk."""
    build, wrap = WRAPPINGS[name]
    model, rank, graph_of = wrap(build()), distributed.get_rank(), StreamedRun._graph_of
    _, loss = logprobs_and_loss(model, SPLITS["both"][rank], 4 * rank, STREAMED)

    def acting(self: StreamedRun, index: int) -> ChunkGraph:
        if index == 1:
            action()
        return graph_of(self, index)

    message = "no error"
    with patch.object(StreamedRun, "_graph_of", acting):
        try:
            loss.backward()
        except Exception as error:
            message = str(error)
    return model, {"message": message, "left": [key for key, p in model.named_parameters() if p.grad is not None]}


def gate_and_dense(name: str) -> list[tuple[str, str, dict[str, torch.Tensor]]]:
    """Ranks that would decide differently each on its own, and a dense path with unequal numbers of sequences."""
    build, wrap = WRAPPINGS[name]
    model, rank = wrap(build()), distributed.get_rank()
    batches: Batches = [star(6, prefix=9), [run(4, seed=9)]]
    results = []
    for saving in (0.3, 0.9):
        out, loss = logprobs_and_loss(model, batches[rank], 6 * rank, TreeConfig(min_saving=saving, verify="first"))
        loss.backward()
        results.append((out.report.executor, out.report.reason, gradients(model)))
    return results


def main(folder: str, *jobs: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    with softmax_in_own_dtype():
        for job in jobs:
            name, argument = job.split(":")
            results[job] = globals()[name](argument)
    torch.save(results, Path(folder, f"rank{distributed.get_rank()}.pt"))
    sys.stdout.flush()
    os._exit(0)  # a gloo thread that drops its last tensor while Python shuts down aborts the process


if __name__ == "__main__":
    main(*sys.argv[1:])
