"""The token-selection benchmark runs, and sees gradients that are not what they have to be. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dta_plugin.token_selection.select import TokenSelection
from tests.support.models import tiny_model

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONTENDERS = ["dense", "tree", "rpc", "urs"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [sys.executable, str(BENCHMARKS / "token_selection.py"), "--smoke", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(printed=done.stdout, result=json.loads(path.read_text()))


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_result_says_where_it_comes_from(run: SimpleNamespace) -> None:
    assert run.result.keys() >= {"commit", "machine", "versions", "clock", "device", "dtype", "model", "selections"}


def test_rows_hold_every_round_of_every_contender(run: SimpleNamespace) -> None:
    (row,) = run.result["rows"]
    assert list(row["updates"]) == CONTENDERS
    assert row["rounds"] == {"dense": 2, "tree": 2, "rpc": 8, "urs": 8}
    for seconds in row["seconds"].values():
        assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(CONTENDERS, 2)
    assert row["faster_than"].keys() == {"dense", "tree"}
    assert all(faster.keys() == set(CONTENDERS) for faster in row["faster_than"].values())


def test_sizes(run: SimpleNamespace) -> None:
    """24 prompt tokens, 4 completions of 16; urs runs up to each row's last kept token."""
    (row,) = run.result["rows"]
    sizes = {name: [update["size"] for update in updates] for name, updates in row["updates"].items()}
    assert [sizes["dense"][0][key] for key in ("flat_tokens", "tree_tokens", "scored_tokens")] == [160, None, 64]
    assert [sizes["tree"][0][key] for key in ("flat_tokens", "tree_tokens", "scored_tokens")] == [160, 88, 64]
    for size in sizes["rpc"]:
        assert size["tree_tokens"] == 24 + size["scored_tokens"] == 24 + round(64 * size["kept_fraction"])
    for size in sizes["urs"]:
        assert size["scored_tokens"] == round(64 * size["kept_fraction"])
        assert 24 + size["scored_tokens"] <= size["tree_tokens"] <= 88
    assert len({size["kept_fraction"] for size in sizes["rpc"]}) > 1, "every run draws anew"


def test_saved_bytes(run: SimpleNamespace) -> None:
    (row,) = run.result["rows"]
    most = {name: max(update["saved_bytes"] for update in updates) for name, updates in row["updates"].items()}
    assert most["rpc"] < most["tree"] < most["dense"]


def test_gradients(run: SimpleNamespace) -> None:
    (row,) = run.result["rows"]
    assert row["error"].keys() == {"dense", "tree", "rpc, budget 1", "urs, budget 1"}
    assert row["error"]["dense"] < 1e-4 and max(row["error"][f"{name}, budget 1"] for name in ("rpc", "urs")) < 1e-6
    for found in row["gradient"].values():
        assert found["drawings"] == 8 and found["one"] > 0.1
        assert found["mean"] < 3 * found["expected"]


def test_disagreements_are_seen(benchmark_module: Callable[[str], ModuleType]) -> None:
    module = benchmark_module("token_selection")
    right = {"name": "a", "error": {"dense": 9e-5, "rpc, budget 1": 9e-7}}
    assert module.disagreements([right], (1e-4, 1e-6)) == []
    wrong = {"name": "b", "error": {"dense": float("nan"), "rpc, budget 1": 2e-6}}
    assert len(module.disagreements([right, wrong], (1e-4, 1e-6))) == 2


def test_weights_that_are_too_small_are_seen(
    benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unweighted, the mean of many drawings stays away from the gradient of all tokens."""
    contenders, workloads = benchmark_module("subset_contenders"), benchmark_module("workloads")
    model, work = tiny_model("qwen3"), workloads.star(5, 6, 3, 32)
    contenders.tree(model, work)()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    step = contenders.on_subset(model, work, TokenSelection(scheme="rpc", floor=0.3))

    def off() -> float:
        deviation = contenders.Deviation(whole)
        for _ in range(60):
            model.zero_grad()
            step()
            deviation.add({name: p.grad for name, p in model.named_parameters()})
        return float(deviation.result()["mean"] / deviation.result()["expected"])

    assert off() < 2
    draw = contenders.draw

    def unweighted(*args: object, **kwargs: object) -> object:
        drawn = draw(*args, **kwargs)
        return type(drawn)((drawn.weights > 0).astype(float), drawn.carries_loss, drawn.entropy)

    monkeypatch.setattr(contenders, "draw", unweighted)
    assert off() > 3


def test_deviation_of_known_gradients(benchmark_module: Callable[[str], ModuleType]) -> None:
    deviation = benchmark_module("subset_contenders").Deviation({"a": torch.tensor([3.0, 4.0])})
    for value in (5.0, 1.0):
        deviation.add({"a": torch.tensor([value, 4.0])})
    assert deviation.result() == pytest.approx({"drawings": 2, "one": 0.4, "mean": 0.0, "expected": 0.4 / 2**0.5})
