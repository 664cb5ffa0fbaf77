"""Faults that training survives: no memory wherever it is asked for, values that are not finite, limits of a process.

What goes on ends with the log-probs and gradients of a run that nothing disturbed; what ends leaves no gradient.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig
from dta_plugin.execution import memory, packed
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.host_memory import free_host_bytes
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.execution.recovery import remedy_named
from dta_plugin.execution.streaming import chunk_runner
from tests.support.models import softmax_in_own_dtype, tiny_model
from tests.support.oracle import dense, difference, functional, result_of
from tests.support.trees import binary, branching_comb

SEQUENCES = branching_comb(5)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError,
}


class Fault:
    """Raises once, when it is reached for the `at`-th time."""

    def __init__(self, error: Callable[[], BaseException], at: int = 1) -> None:
        self.error, self.left = error, at

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error()


def in_forward(model: PreTrainedModel, fault: Fault, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].register_forward_pre_hook(fault)


def in_backward(model: PreTrainedModel, fault: Fault, _: pytest.MonkeyPatch) -> None:
    def hook(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fault)

    model.model.layers[0].register_forward_hook(hook)


def in_head(_: PreTrainedModel, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    score = packed.edge_logprobs
    patch.setattr(packed, "edge_logprobs", lambda *a, **k: (fault(), score(*a, **k))[1])


def in_gradient_of_head(_: PreTrainedModel, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    score = packed.edge_logprobs

    def failing(rows: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if rows.requires_grad:
            rows.register_hook(fault)
        return score(rows, *arguments, **options)

    patch.setattr(packed, "edge_logprobs", failing)


PLACES = {"forward": in_forward, "backward": in_backward, "head": in_head, "head_backward": in_gradient_of_head}


@pytest.fixture(autouse=True)
def float64_throughout() -> Any:
    with softmax_in_own_dtype():
        yield


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_packed_out_of_memory_goes_on_in_chunks(place: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    tokens = dta_plugin.PrefixTree.from_sequences(SEQUENCES).tree_tokens
    fault = Fault(ERRORS[kind])
    PLACES[place](model, fault, monkeypatch)
    out = dta_plugin.sequence_logprobs(model, SEQUENCES, return_entropy=True)
    assert out.entropies is not None
    expected = dense(pristine, SEQUENCES)
    assert difference(result_of(model, out.logprobs, out.entropies, functional), expected).worst < 1e-10
    assert fault.left <= 0
    assert memory.token_budget(model, torch.device("cpu"), None) == tokens // 2, "what was learned is kept"
    report = dta_plugin.sequence_logprobs(model, SEQUENCES).report
    assert report.executor == "streamed" and (report.peak_tokens or 0) <= tokens // 2


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("at", [1, 4, 7])
def test_streamed_out_of_memory_of_any_kind(kind: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    fault, run = Fault(ERRORS[kind], at), chunk_runner.ChunkRunner.run
    monkeypatch.setattr(chunk_runner.ChunkRunner, "run", lambda *a, **k: (fault(), run(*a, **k))[1])
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=6)
    out = dta_plugin.sequence_logprobs(model, binary(3), config, return_entropy=True)
    assert out.entropies is not None
    actual = result_of(model, out.logprobs, out.entropies, functional)
    assert difference(actual, dense(pristine, binary(3))).worst < 1e-10 and fault.left <= 0


def gradients_of(model: PreTrainedModel) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.usefixtures("unprobed")
def test_gradients_that_were_there_are_added_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pristine, model = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    for each in (pristine, model):
        torch.cat(dta_plugin.sequence_logprobs(each, SEQUENCES).logprobs).sum().backward()
    in_backward(model, Fault(ERRORS["cpu"]), monkeypatch)
    for each in (pristine, model):
        torch.cat(dta_plugin.sequence_logprobs(each, binary(3)).logprobs).square().sum().backward()
    for expected, actual in zip(gradients_of(pristine), gradients_of(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("error", "executor"),
    [(lambda: RuntimeError("killed"), "auto"), (ERRORS["cpu"], "packed")],
    ids=["other", "packed"],
)
def test_what_does_not_go_on_raises(
    error: Callable[[], BaseException], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    in_backward(model, Fault(error), monkeypatch)
    loss = torch.cat(dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(executor=executor)).logprobs).sum()
    with pytest.raises(RuntimeError, match=r"killed|allocate"):
        loss.backward()
    assert executor == "packed" or gradients_of(model) == [None] * len(list(model.parameters()))


@pytest.mark.usefixtures("unprobed")
def test_dropout_cannot_be_drawn_again_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5)
    in_backward(model, Fault(ERRORS["cpu"]), monkeypatch)
    loss = torch.cat(dta_plugin.sequence_logprobs(model, SEQUENCES).logprobs).sum()
    with pytest.raises(RuntimeError, match="allocate"):
        loss.backward()
    assert gradients_of(model) == [None] * len(list(model.parameters()))


def test_a_second_pass_gives_the_same_gradients() -> None:
    model = tiny_model("llama", torch.float64).train()
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5)
    loss = torch.cat(dta_plugin.sequence_logprobs(model, SEQUENCES).logprobs).sum()
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("executor", ["auto", "streamed"])
def test_a_scaler_skips_the_step_that_overflows(executor: str) -> None:
    """Three steps of which the second overflows: the weights and the scale of a dense run."""
    weights, scales = [], []
    for is_tree in (False, True):
        model = tiny_model("llama", torch.float64)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(3):
            hook = model.model.layers[0].register_forward_hook(lambda _, __, out: out * float("inf"))
            if step != 1:
                hook.remove()
            if is_tree:
                config = TreeConfig(
                    executor=executor, probe="off", max_tree_tokens_per_chunk=9 + 90 * (executor == "auto")
                )
                result = run_tree(model, prepare_batch(model, SEQUENCES, None, config), config, has_scaler=True)
                loss = torch.cat(result.logprobs).mean()
            else:
                rows = [torch.tensor([s]) for s in SEQUENCES]
                logits = [model(row, use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows]
                logprobs = [x.gather(1, r[0, 1:, None])[:, 0] for x, r in zip(logits, rows, strict=True)]
                loss = torch.cat(logprobs).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            hook.remove()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        scales.append(scaler.get_scale())
    assert scales == [128.0, 128.0]
    assert weights[1].isfinite().all()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "has_scaler", "raises"),
    [("auto", False, True), ("auto", True, False), ("error", True, True), ("pass", False, False)],
)
def test_what_is_not_finite(choice: str, has_scaler: bool, raises: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for executor in ("packed", "streamed"):
        config = TreeConfig(executor=executor, on_nonfinite=choice, probe="off")
        batch = prepare_batch(model, SEQUENCES, None, config)
        if raises:
            with pytest.raises(InvalidInputError, match=r"gave \d+ NaN or infinite log-probs.*on_nonfinite='pass'"):
                run_tree(model, batch, config, has_scaler=has_scaler)
        else:
            assert not torch.cat(run_tree(model, batch, config, has_scaler=has_scaler).logprobs).isfinite().any()


@pytest.fixture
def ranks_of_one(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("unprobed", "ranks_of_one")
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("kind", ERRORS)
def test_tied_ranks_are_told_what_to_set(place: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), dta_plugin.PrefixTree.from_sequences(SEQUENCES).tree_tokens
    PLACES[place](model, Fault(ERRORS[kind]), monkeypatch)
    tied, remedy = DistributedDataParallel(model), f"set max_tree_tokens_per_chunk below {tokens}, or executor='stream"
    with pytest.raises(torch.OutOfMemoryError, match=remedy), remedy_named(tied):
        torch.cat(dta_plugin.sequence_logprobs(tied, SEQUENCES).logprobs).sum().backward()


@pytest.mark.usefixtures("unprobed", "ranks_of_one")
@pytest.mark.parametrize("case", ["another error", "to be packed", "dense"])
def test_errors_that_no_option_helps_stay_as_they_are(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tied = DistributedDataParallel(model)
    with remedy_named(tied):  # a tree that could be told, and is over
        torch.cat(dta_plugin.sequence_logprobs(tied, SEQUENCES).logprobs).sum().backward()
    options = {"to be packed": {"executor": "packed"}, "dense": {"min_saving": 0.99}}.get(case, {})
    in_backward(model, Fault(ERRORS["cpu"] if options else lambda: RuntimeError("killed")), monkeypatch)
    with pytest.raises(RuntimeError, match=r"^killed|can't allocate memory"), remedy_named(tied):
        torch.cat(dta_plugin.sequence_logprobs(tied, SEQUENCES, TreeConfig(**options)).logprobs).sum().backward()


def test_two_threads_with_one_model() -> None:
    model, inside, done = tiny_model("llama"), threading.Event(), threading.Event()
    expected = dta_plugin.sequence_logprobs(copy.deepcopy(model), SEQUENCES).logprobs
    dta_plugin.sequence_logprobs(model, SEQUENCES)

    def wait(*_: Any) -> None:
        inside.set()
        assert done.wait(60)

    hook = model.model.layers[0].register_forward_pre_hook(wait)
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(dta_plugin.sequence_logprobs(model, SEQUENCES).logprobs))
    first.start()
    assert inside.wait(60)
    try:
        for call in (lambda: dta_plugin.sequence_logprobs(model, SEQUENCES), lambda: model(torch.tensor([[5, 6]]))):
            with pytest.raises(InvalidInputError, match=r"another thread runs it as a tree.*a model of its own"):
                call()
    finally:
        done.set()
        first.join()
        hook.remove()
    for result in (found[0], dta_plugin.sequence_logprobs(model, SEQUENCES).logprobs):
        torch.testing.assert_close(torch.cat(result), torch.cat(expected))


FILES = {
    "machine": ({}, 1000 * 1024),
    "v2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max"}, 1000 * 1024),
    "v2_limit_above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "5000\n",
            "sys/fs/cgroup/a/memory.current": "3000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 500\n",
        },
        2500,
    ),
    "v1": (
        {
            "proc/self/cgroup": "7:cpu,cpuacct:/x\n4:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4096",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "96",
        },
        4000,
    ),
    "in_a_container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "9", "sys/fs/cgroup/memory.current": "2"},
        7,
    ),
    "used_up": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2", "sys/fs/cgroup/memory.current": "9"},
        0,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_free_memory_is_what_the_tightest_limit_leaves(name: str, tmp_path: Path) -> None:
    files, expected = FILES[name]
    for path, content in ({"proc/meminfo": "MemFree: 1 kB\nMemAvailable:   1000 kB\n"} | files).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert free_host_bytes(tmp_path) == expected


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import dta_plugin
from dta_plugin.execution import memory
from tests.support.models import tiny_model
from tests.support.trees import star

model, sequences = tiny_model("llama", hidden_size=256, intermediate_size=2048), star(20, prefix=20, branch=80)
torch.cat(dta_plugin.sequence_logprobs(model, star(2)).logprobs).sum().backward()
model.zero_grad()
if sys.argv[1] != "0":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
out = dta_plugin.sequence_logprobs(model, sequences)
torch.cat(out.logprobs).sum().backward()
print(out.report.executor, memory.free_bytes(torch.device("cpu")) < 2**30)
print(*(p.grad.double().norm().item() for p in model.parameters()))
"""


@pytest.mark.long
def test_a_process_limited_to_600_megabytes() -> None:
    def run(limit: int) -> list[str]:
        command = [sys.executable, "-c", _LIMITED, str(limit)]
        root = Path(dta_plugin.__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()

    free, limited = run(0), run(600 * 2**20)
    assert (free[0].split()[0], limited[0]) == ("packed", "streamed True")
    norms = [[float(x) for x in lines[1].split()] for lines in (free, limited)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
