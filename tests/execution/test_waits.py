"""The CPU runs ahead of the device: one wait per batch, none per layer, chunk or tile, forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.attention import api, self_check, triton_backend
from dta_plugin.attention.triton_table import Launch, Launches
from dta_plugin.models import tiled_logprobs as logprobs
from tests.support.interpreter import ON_GPU
from tests.support.models import tiny_model
from tests.support.trees import Sequences, branching_comb, star
from tests.support.waits import Waits, counted

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_waits.py asks CUDA itself")

CONFIGS = {
    "packed": TreeConfig(backend="triton"),
    "streamed": TreeConfig(backend="triton", executor="streamed", max_tree_tokens_per_chunk=16),
}
SEQUENCES = star(4, prefix=20, branch=6)


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch, unprobed: None) -> None:
    """The self-check is once per process, the probe once per model: not a batch's."""
    size = Launch(16, 16, 4, 2)
    monkeypatch.setattr(triton_backend, "launches", lambda *_: Launches(size, size, size))
    monkeypatch.setattr(api, "triton_obstacle", lambda *_: None)
    monkeypatch.setattr(api, "trusted_backend", lambda *_: "triton")
    assert self_check.trusted_backend is not api.trusted_backend


def step(
    patch: pytest.MonkeyPatch,
    config: TreeConfig,
    sequences: Sequences = SEQUENCES,
    model: torch.nn.Module | None = None,
    **options: object,
) -> Waits:
    model = model or tiny_model("qwen3")
    with counted(patch) as waits:
        out = dta_plugin.sequence_logprobs(model, sequences, config, **options)
        torch.cat(out.logprobs).sum().backward()
    assert out.report.backend == "triton" and all(p.grad is not None for p in model.parameters())
    return waits


@pytest.mark.parametrize("how", CONFIGS)
def test_one_wait_per_batch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_TILE_ROWS", 8)
    monkeypatch.setattr(logprobs, "_TILE_VOCAB", 64)
    waits = step(monkeypatch, CONFIGS[how], return_entropy=True, scored=[5] * 4)
    assert len(waits.places) == 1 and "execution/packed.py" in waits.places[0], waits.places
    assert waits.copies > 0


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_variants(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for how in ("packed", "streamed"):
        waits = step(monkeypatch, CONFIGS[how], branching_comb(3), tiny_model(family))
        ours = [place for place in waits.places if "/transformers/" not in place]  # its mixture of experts waits
        assert len(ours) == 1, ours


def in_every_layer(patch: pytest.MonkeyPatch, method: str, read: Callable[[torch.Tensor], object]) -> None:
    own = getattr(triton_backend.TritonKernels, method)

    def waiting(self: object, x: torch.Tensor, *rest: torch.Tensor) -> object:
        read(x)
        return own(self, x, *rest)

    patch.setattr(triton_backend.TritonKernels, method, waiting)


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda q: q.sum().item(),
    "bool": lambda q: bool((q > 0).all()),
    "int": lambda q: int(q.sum()),
    "tolist": lambda q: q.tolist(),
    "numpy": lambda q: q.detach().numpy(),
    "cpu": lambda q: q.cpu(),
    "nonzero": lambda q: q.nonzero(),
    "boolean index": lambda q: q[q > 0],
    "boolean assignment": lambda q: q.detach().clone().__setitem__(q > 0, 0.0),
    "unique": lambda q: q.unique(),
    "repeat": lambda q: q.flatten()[:2].repeat_interleave(torch.ones_like(q.flatten()[:2], dtype=torch.int64)),
    "copy to the device": lambda q: torch.tensor([1.0], device=q.device),
    "copy of an array": lambda q: torch.from_numpy(READ_ONLY).to(q.device),
}
READ_ONLY = torch.zeros(3).numpy()


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("name", READS)
def test_negative_control_waits_are_seen(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_every_layer(monkeypatch, method, READS[name])
    assert len(step(monkeypatch, CONFIGS["packed"], star(2)).places) == 3  # two layers, and the batch's own
