"""Streamed execution: training of every kind through it, memory that runs out, what is refused, negative controls."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig
from dta_plugin.execution import memory
from dta_plugin.execution.streaming import chunk_runner as chunks
from dta_plugin.execution.streaming import kv_arena as arena
from dta_plugin.execution.streaming import streamed_run
from tests.support.models import softmax_in_own_dtype, tiny_model
from tests.support.oracle import Result, Rows, dense, difference, functional, gradient_norm
from tests.support.tree_run import STREAMED_FAMILIES, bfloat16_and_its_truth, model_pair, through_tree
from tests.support.trees import (
    FIRST_TOKEN,
    Sequences,
    binary,
    branching_comb,
    run,
    star,
)

BRANCHED = branching_comb(5)


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def stream(budget: int, **options: Any) -> TreeConfig:
    return TreeConfig(executor="streamed", max_tree_tokens_per_chunk=budget, **options)


def with_lora(family: str) -> nn.Module:
    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model(family, torch.float64), options).train()


def plain(family: str) -> nn.Module:
    return tiny_model(family, torch.float64).train()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("build", [plain, with_lora])
@pytest.mark.parametrize("family", STREAMED_FAMILIES)
def test_lora_and_checkpointing(family: str, build: Callable[[str], nn.Module], checkpointing: bool | None) -> None:
    pristine, model = build(family), build(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})  # type: ignore[operator]
        if build is with_lora:
            model.enable_input_require_grads()  # type: ignore[operator]
    own = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    expected = dense(pristine, BRANCHED)
    for budget in (4, 11):
        found = difference(through_tree(model, BRANCHED, config=stream(budget), executor="streamed"), expected)
        assert found.worst < 1e-10, found
    assert own == [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]


def test_tied_embeddings() -> None:
    pristine, model = (tiny_model("llama", torch.float64, tie_word_embeddings=True) for _ in range(2))
    found = difference(through_tree(model, BRANCHED, config=stream(6), executor="streamed"), dense(pristine, BRANCHED))
    assert found.worst < 1e-10, found


def test_gradients_accumulate_over_batches_and_calls_may_overlap() -> None:
    pristine, model = model_pair("qwen3", torch.float64)
    first, second = BRANCHED, binary(3)
    expected = [dense(pristine, sequences).gradients for sequences in (first, second)]
    outputs = [dta_plugin.sequence_logprobs(model, s, stream(5), return_entropy=True) for s in (first, second)]
    for out in outputs:
        functional(out.logprobs, out.entropies or []).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], rtol=1e-9, atol=1e-12)
    model.zero_grad()


def test_no_gradient_wanted() -> None:
    pristine, model = model_pair("llama", torch.float64)
    with torch.no_grad():
        out = dta_plugin.sequence_logprobs(model, BRANCHED, stream(6))
    for actual, expected in zip(out.logprobs, dense(pristine, BRANCHED).logprobs, strict=True):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=1e-10)
    assert not any(x.requires_grad for x in out.logprobs)


@pytest.mark.parametrize("budget", [9, 40])
def test_dropout_draws_the_same_numbers_when_a_chunk_runs_again(budget: int) -> None:
    """Finite differences of the loss: with other masks in the second pass the derivative would be another one."""
    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", torch.float64), options).train()
    weights = [p for p in model.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        out = dta_plugin.sequence_logprobs(model, binary(4), stream(budget))
        return sum((row.sum() for row in out.logprobs), torch.zeros((), dtype=torch.float64))

    slope = sum((g * g).sum() for g in torch.autograd.grad(loss(), weights))
    gradients = torch.autograd.grad(loss(), weights)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += sign * step * gradient
        values.append(loss().item())
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= sign * step * gradient
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("budget", [150, 1001])
@pytest.mark.parametrize("where", ["shared tokens", "all tokens"])
def test_fan_out_1000_in_bfloat16_loses_no_gradient(where: str, budget: int) -> None:
    """1,000 small gradients of one sign meet in the shared tokens: a bfloat16 sum would stall and halve the result."""
    model, _, wide = bfloat16_and_its_truth("llama")
    sequences = star(1000, prefix=8)
    scored = None if where == "all tokens" else [torch.arange(10) < 8] * 1000

    def mean(logprobs: Rows, _: Rows) -> torch.Tensor:
        return -torch.cat(list(logprobs)).mean()

    norms = [
        gradient_norm(through_tree(m, sequences, scored, config=stream(budget), loss=mean, executor="streamed"))
        for m in (model, wide)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def oom_once(monkeypatch: pytest.MonkeyPatch, at_call: int) -> list[int]:
    """The `at_call`-th model call runs out of memory. -> sizes of all calls."""
    forward, sizes = chunks.ChunkRunner.run, []

    def failing(self: chunks.ChunkRunner, chunk: Any, *arguments: Any, **options: Any) -> list[torch.Tensor]:
        sizes.append(len(chunk.depth))
        if len(sizes) == at_call:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, chunk, *arguments, **options)

    monkeypatch.setattr(chunks.ChunkRunner, "run", failing)
    return sizes


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("at_call", [2, 5], ids=["forward", "backward"])
def test_out_of_memory_halves_the_budget_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_call: int
) -> None:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    sizes = oom_once(monkeypatch, at_call)
    with caplog.at_level(logging.WARNING, logger="dta_plugin"):
        actual = through_tree(model, binary(3), config=stream(8), executor="streamed")
    assert difference(actual, dense(pristine, binary(3))).worst < 1e-10
    assert caplog.messages == [
        "dta: out of memory with 8 tokens per chunk; going on with 4 (max_tree_tokens_per_chunk sets it)"
    ]
    assert max(sizes[at_call:]) <= 4
    sizes.clear()
    through_tree(model, binary(3), config=stream(8), executor="streamed")
    assert max(sizes) <= 4, "what was learned is kept"


@pytest.mark.usefixtures("unprobed")
def test_out_of_memory_at_one_token_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    oom_once(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        dta_plugin.sequence_logprobs(tiny_model("llama"), binary(3), stream(1))


@pytest.mark.parametrize("at_call", [5, 6, 9])
def test_an_error_inside_a_chunk_leaves_no_gradient_behind(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    out = dta_plugin.sequence_logprobs(model, binary(3), stream(6))
    forward, calls = chunks.ChunkRunner.run, []

    def failing(*arguments: Any, **options: Any) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == at_call - 4:
            raise RuntimeError("killed")
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(chunks.ChunkRunner, "run", failing)
        with pytest.raises(RuntimeError, match="killed"):
            torch.cat(out.logprobs).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    retry = through_tree(model, binary(3), config=stream(6), executor="streamed")
    assert difference(retry, dense(pristine, binary(3))).worst < 1e-10


def test_auto_streams_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    per_token = memory.bytes_per_token(model)
    monkeypatch.setattr(memory, "KEEP_BYTES", 0)

    def executor(tokens_that_fit: int, config: TreeConfig | None = None) -> str:
        free = (tokens_that_fit + 0.5) * per_token
        monkeypatch.setattr(memory, "free_bytes", lambda _: free / memory._SHARE)
        report = dta_plugin.sequence_logprobs(model, BRANCHED, config).report
        limit = config.max_tree_tokens_per_chunk if config else None
        assert (report.peak_tokens or 0) <= (limit or tokens_that_fit)
        return report.executor

    tokens = dta_plugin.PrefixTree.from_sequences(BRANCHED).tree_tokens
    assert executor(tokens) == "packed"
    assert executor(tokens - 1) == "streamed"
    assert executor(tokens - 1, TreeConfig(executor="packed")) == "packed"
    assert executor(tokens, TreeConfig(max_tree_tokens_per_chunk=9)) == "streamed"


@pytest.mark.parametrize("family", STREAMED_FAMILIES)
def test_bytes_per_token_are_about_what_a_forward_pass_saves(family: str) -> None:
    model = tiny_model(family).train()
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.arange(3, 259)[None]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.model(tokens, use_cache=False)
    saved = sum(size for pointer, size in seen.items() if pointer not in weights) / tokens.numel()
    assert 0.5 < memory.bytes_per_token(model) / saved < 2


def test_refused_backends() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match=r"'reference': streaming needs 'cpu' or 'triton'. Use executor='auto'"):
        dta_plugin.sequence_logprobs(model, BRANCHED, stream(5, backend="reference"))
    config = TreeConfig(backend="reference", max_tree_tokens_per_chunk=9)
    report = dta_plugin.sequence_logprobs(model, BRANCHED, config).report
    assert report.executor == "packed" and report.reason.endswith(
        "; max_tree_tokens_per_chunk=9 is not kept: attention through backend 'reference': streaming needs 'cpu' or "
        "'triton'"
    )


def test_gradient_hooks_on_parameters_do_not_stream() -> None:
    """Such a hook would see every chunk's gradient and then their sum."""
    model = tiny_model("llama")
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(InvalidInputError, match=r"a gradient hook on lm_head\.weight"):
        dta_plugin.sequence_logprobs(model, BRANCHED, stream(5))
    assert dta_plugin.sequence_logprobs(model, BRANCHED).report.executor == "packed"
    handle.remove()
    assert dta_plugin.sequence_logprobs(model, BRANCHED, stream(5)).report.executor == "streamed"


def test_debug_log_names_every_chunk(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="dta_plugin"):
        through_tree(tiny_model("llama"), binary(3), config=stream(6), executor="streamed")
    runs = [message.split(":")[1].strip() for message in caplog.messages]
    assert {"chunk 1 of 6", "chunk 6 of 6", "chunk 1 of 6, again", "chunk 1 of 6, cached tokens"} <= set(runs)


def broken() -> float:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    actual: Result = through_tree(model, binary(4), config=stream(7), executor="streamed")
    return difference(actual, dense(pristine, binary(4))).gradients


def test_negative_control_gradients_of_descendants_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    collect = arena.ArenaPlace.collect

    def forgetful(self: arena.ArenaPlace, keys: torch.Tensor, values: torch.Tensor) -> Any:
        own = collect(self, keys, values)
        keys.zero_()
        return own

    monkeypatch.setattr(arena.ArenaPlace, "collect", forgetful)
    assert broken() > 1e-2


def test_negative_control_ancestors_of_another_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_run.CachedPath, "restore", lambda self, index: iter(()))
    assert broken() > 1e-2


def test_negative_control_chunks_without_scored_tokens_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena.ArenaPlace, "gradients", _without_descendants)
    assert broken() > 1e-2


def _without_descendants(self: arena.ArenaPlace, keys: torch.Tensor, values: torch.Tensor) -> Any:
    self.layer.allocate_gradients()
    stop = keys.shape[2]
    return self.layer.grad_k[:, :, :stop], self.layer.grad_v[:, :, :stop].mul_(0)


class SavedBytes:
    """Bytes that autograd keeps for the backward pass: now, and the most there were."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(held, self._free, tensor.nbytes)
        return held

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(eq=False)
class _Held:
    tensor: torch.Tensor


def sessions(count: int) -> Sequences:
    """Trees of 1,856 tokens each: a prompt of 64, four branches of 64, three answers of 128 to each."""
    return [
        [FIRST_TOKEN + tree, *run(63), FIRST_TOKEN + branch, *run(63), FIRST_TOKEN + answer, *run(127, seed=answer)]
        for tree in range(count)
        for branch in range(4)
        for answer in range(3)
    ]


def peak_of(sequences: Sequences, config: TreeConfig, model: nn.Module | None = None) -> int:
    """model: a tiny Qwen3 for None."""
    model, saved = model or tiny_model("qwen3").train(), SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        out = dta_plugin.sequence_logprobs(model, sequences, config)
        torch.cat(out.logprobs).mean().backward()
    return saved.peak


def test_memory_does_not_grow_with_the_tree() -> None:
    """From 4k to 64k tokens with a longest path of 256: what is saved grows with the tree only where it runs packed."""
    small, large = (peak_of(sessions(count), stream(1024)) for count in (3, 36))
    assert large < 1.1 * small
    assert peak_of(sessions(3), TreeConfig(executor="packed")) > 4 * small
