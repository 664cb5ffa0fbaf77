"""The same equality with the model inside PEFT, DDP and FSDP2, and inside autocast."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dta_plugin import InvalidInputError, TreeConfig, sequence_logprobs
from dta_plugin.execution.streaming.chunk_runner import ChunkGraph, ChunkRunner
from dta_plugin.execution.streaming.streamed_run import StreamedRun
from dta_plugin.verify import compare
from tests.support.models import softmax_in_own_dtype, tiny_model
from tests.support.oracle import Result, dense, difference, gradient_error, rms
from tests.support.tree_run import model_pair, through_tree
from tests.support.trees import branching_comb

SEQUENCES = branching_comb(4)

LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "every linear": {"target_modules": "all-linear"},
    "LM head": {"target_modules": ["q_proj", "lm_head"]},
    "trained copy of the LM head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "trained copy of the embeddings": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]},
}

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_lora(family: str, options: dict[str, Any]) -> torch.nn.Module:
    model = tiny_model(family, torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, **options)).double()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_lora(family: str, kind: str, checkpointing: bool | None) -> None:
    expected = dense(with_lora(family, LORA[kind]), SEQUENCES, temperature=0.8)
    model = with_lora(family, LORA[kind]).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    found = difference(through_tree(model, SEQUENCES, temperature=0.8), expected)
    assert any("lora_A" in name for name in expected.gradients)
    assert found.worst < 1e-10, found


def test_disabled_adapter_gives_the_reference_model() -> None:
    model = with_lora("llama", LORA["every linear"])
    expected = dense(model_pair("llama", torch.float64)[0], SEQUENCES)
    with model.disable_adapter(), torch.no_grad():
        actual = through_tree(model, SEQUENCES)
    for a, b in zip(actual.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def strip(result: Result, prefix: str) -> Result:
    return Result(
        result.logprobs, result.entropies, {name.removeprefix(prefix): g for name, g in result.gradients.items()}
    )


@pytest.mark.parametrize("budget", [None, 7], ids=["packed", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_ddp(process_group: None, family: str, budget: int | None) -> None:
    model = DistributedDataParallel(tiny_model(family, torch.float64).train())
    config, executor = TreeConfig(max_tree_tokens_per_chunk=budget), "streamed" if budget else "packed"
    actual = strip(through_tree(model, SEQUENCES, config=config, executor=executor), "module.")
    found = difference(actual, dense(model_pair(family, torch.float64)[0], SEQUENCES))
    assert found.worst < 1e-10, found


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2(process_group: None, tied: bool, chunk: int | None) -> None:
    pristine, model = (tiny_model("llama", torch.float64, tie_word_embeddings=tied).train() for _ in range(2))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    executor = "streamed" if chunk else "packed"
    actual = through_tree(model, SEQUENCES, config=TreeConfig(max_tree_tokens_per_chunk=chunk), executor=executor)
    whole = {name: g.full_tensor() for name, g in actual.gradients.items()}  # type: ignore[attr-defined]
    found = difference(Result(actual.logprobs, actual.entropies, whole), dense(pristine, SEQUENCES))
    assert found.worst < 1e-10, found


def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    run, calls = ChunkRunner.run, []

    def failing(*arguments: Any, **options: Any) -> ChunkGraph:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("simulated")
        return run(*arguments, **options)

    monkeypatch.setattr(ChunkRunner, "run", failing)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("call", [2, 6], ids=["forward", "backward"])
def test_ddp_out_of_memory(process_group: None, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """In the backward pass the first chunk's graph is DDP's already: it must count for nothing in the new run."""
    model = DistributedDataParallel(tiny_model("llama", torch.float64).train())
    out_of_memory_at(monkeypatch, call)
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=6)
    actual = strip(through_tree(model, SEQUENCES, config=config, executor="streamed"), "module.")
    found = difference(actual, dense(model_pair("llama", torch.float64)[0], SEQUENCES))
    assert found.worst < 1e-10, found


@pytest.mark.usefixtures("unprobed")
def test_fsdp2_out_of_memory_is_an_error(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64).train()
    fully_shard(model)
    out_of_memory_at(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError, match="set max_tree_tokens_per_chunk below 8"):
        through_tree(model, SEQUENCES, config=TreeConfig(executor="streamed", max_tree_tokens_per_chunk=8))


def test_no_sequences(process_group: None) -> None:
    """In one process an error; a wrapped rank takes part with gradients of zero."""
    model = tiny_model("llama", torch.float64).train()
    with pytest.raises(InvalidInputError, match="empty batch"):
        sequence_logprobs(model, [])
    for budget in (None, 1):
        out = sequence_logprobs(DistributedDataParallel(model), [], TreeConfig(max_tree_tokens_per_chunk=budget))
        assert (out.logprobs, out.entropies, out.anchor.item()) == ([], None, 0.0)
        assert "no sequences here" in str(out.report)
        out.anchor.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        model.zero_grad()


def by_layers() -> torch.nn.Module:
    model = tiny_model("llama", torch.float64).train()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_fsdp2_backward_through_another_call_too_is_an_error(process_group: None) -> None:
    """In the middle of another call's backward pass FSDP2 gathers nothing: gradients would be silently wrong."""
    model, streamed = by_layers(), TreeConfig(executor="streamed", max_tree_tokens_per_chunk=8)
    losses = [torch.cat(sequence_logprobs(model, SEQUENCES, c).logprobs).sum() for c in (streamed, TreeConfig())]
    with pytest.raises(InvalidInputError, match="call backward for each loss by itself"):
        (losses[0] + losses[1]).backward()


def test_fsdp2_second_backward_is_an_error(process_group: None) -> None:
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=8)
    loss = torch.cat(sequence_logprobs(by_layers(), SEQUENCES, config).logprobs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(InvalidInputError, match="A second backward pass"):
        loss.backward()


def test_tensor_parallel_parameters_do_not_stream(process_group: None) -> None:
    model = tiny_model("llama")
    mlp = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    parallelize_module(model.model.layers[0].mlp, init_device_mesh("cpu", (1,)), mlp)
    with pytest.raises(InvalidInputError, match="tensor-parallel parameters"):
        sequence_logprobs(model, SEQUENCES, TreeConfig(executor="streamed"))


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, lambda model: model], ids=["ddp", "plain"])
def test_what_never_goes_backward_is_freed(process_group: None, wrap: Any) -> None:
    model, alive = wrap(tiny_model("llama").train()), []
    own = StreamedRun.__init__

    def watched(self: StreamedRun, *arguments: Any) -> None:
        alive.append(weakref.ref(self))
        own(self, *arguments)

    with patch.object(StreamedRun, "__init__", watched):
        out = sequence_logprobs(model, SEQUENCES, TreeConfig(executor="streamed", max_tree_tokens_per_chunk=6))
    assert alive[0]() is not None
    del out
    gc.collect()
    assert alive[0]() is None


@pytest.mark.parametrize("wrap", [DistributedDataParallel, lambda model: model], ids=["ddp", "plain"])
def test_only_the_head_is_trained(process_group: None, wrap: Any) -> None:
    models = [tiny_model("qwen3", torch.float64).train() for _ in range(2)]
    for model in models:
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=6)
    actual = strip(through_tree(wrap(models[0]), SEQUENCES, config=config, executor="streamed"), "module.")
    found = difference(actual, dense(models[1], SEQUENCES))
    assert list(actual.gradients) == ["lm_head.weight"] and found.worst < 1e-10, found


@pytest.mark.parametrize("budget", [None, 6], ids=["packed", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_autocast_is_no_worse_than_dense_autocast(family: str, budget: int | None) -> None:
    """float32 parameters, bfloat16 products: gradient errors to float32, root mean square over seeds."""
    config, executor = TreeConfig(max_tree_tokens_per_chunk=budget), "streamed" if budget else "packed"
    found, allowed = [], []
    for seed in range(6):
        pristine, model = tiny_model(family, seed=seed), tiny_model(family, seed=seed)
        truth = dense(pristine, SEQUENCES)
        with torch.autocast("cpu", torch.bfloat16):
            expected = dense(pristine, SEQUENCES)
            actual = through_tree(model, SEQUENCES, config=config, executor=executor)
        found.append(gradient_error(actual, truth))
        allowed.append(gradient_error(expected, truth))
    assert 1e-3 < rms(found) <= 1.2 * rms(allowed)


def test_compare_agrees_for_a_wrapped_model() -> None:
    found = compare(with_lora("qwen3", LORA["every linear"]), SEQUENCES, temperature=0.7)
    assert found.logprobs.most < 1e-10
    assert found.worst_gradient[1] < 1e-10
