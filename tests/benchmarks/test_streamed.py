"""The streaming benchmark runs, its contenders agree, and its one-path plan is one. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dta_plugin import InvalidInputError, PrefixTree
from dta_plugin.execution.streaming.plan import Plan
from tests.support.models import tiny_model
from tests.support.trees import SHAPES, Sequences, binary, branching_comb, star

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONTENDERS = ["packed", "dense", *(f"{kind} 1/{n}" for n in (2, 4, 8) for kind in ("streamed", "one path"))]
PLAIN = ("packed", "dense", "streamed", "one path")
BRANCHED = {"binary": binary(4), "comb": branching_comb(6), "star": star(9), "chain": [list(range(3, 40))] * 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [sys.executable, str(BENCHMARKS / "streamed.py"), "--smoke", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(printed=done.stdout, result=json.loads(path.read_text()))


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def workload(module: Callable[[str], ModuleType], sequences: Sequences) -> Any:
    advantages = torch.randn(len(sequences), generator=torch.Generator().manual_seed(0))
    return module("workloads").Workload("", list(map(torch.tensor, sequences)), [1] * len(sequences), advantages)


def test_result_says_where_it_comes_from(run: SimpleNamespace) -> None:
    assert run.result.keys() >= {"commit", "machine", "versions", "clock", "device", "dtype", "model"}


def test_rows_hold_every_round_of_every_contender(run: SimpleNamespace) -> None:
    assert [row["name"] for row in run.result["rows"]] == ["star", "bushy", "comb"]
    for row in run.result["rows"]:
        assert list(row["examined"]) == CONTENDERS
        assert row["milliseconds"].keys() == row["over_packed"].keys() == set(CONTENDERS)
        assert list(row["one_path_over_streamed"]) == ["1/2", "1/4", "1/8"]
        for clock in ("wall", "cpu"):
            assert row["seconds"][clock].keys() == set(CONTENDERS) - {"dense"}
            assert all(len(seconds) == row["rounds"] == 2 for seconds in row["seconds"][clock].values())


def test_the_model_saw_the_tokens_that_the_plan_counts(run: SimpleNamespace) -> None:
    for row in run.result["rows"]:
        for name, examined in row["examined"].items():
            planned = examined["recomputed_tokens"] + examined["rebuilt_tokens"]
            assert examined["tokens"] == (row["flat_tokens"] if name == "dense" else row["tree_tokens"] + planned)
            assert examined["calls"] >= examined["chunks"]
            assert (examined["arena_bytes"] > 0) == (name not in ("packed", "dense"))
            assert 0 <= examined["error"] < 1e-4


def test_only_packed_grows_with_the_tree(run: SimpleNamespace) -> None:
    small, large = run.result["growth"]["rows"]
    assert small["longest_path"] == large["longest_path"]
    growth = {name: large["examined"][name]["saved_bytes"] / small["examined"][name]["saved_bytes"] for name in PLAIN}
    assert growth["packed"] > 2
    assert all(growth[name] < 1.1 for name in PLAIN if name != "packed"), growth


def test_checks_are_printed(run: SimpleNamespace) -> None:
    assert len(run.result["checks"]) == 3 * 4
    for check in run.result["checks"]:
        assert f"{check['claim']}: {check['value']:.2f}, {'met' if check['met'] else 'NOT MET'}" in run.printed


@pytest.mark.parametrize("budget", [1, 4, 7, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_one_path_plans_are_single_paths_that_cover_the_tree(
    benchmark_module: Callable[[str], ModuleType], name: str, budget: int
) -> None:
    tree = PrefixTree.from_sequences(SHAPES[name])
    module = benchmark_module("one_path")
    for plan in (module.one_path_plan(tree, budget), *(module._plan(tree, budget, True, way) for way in (True, False))):
        assert sorted(np.concatenate([chunk.tokens for chunk in plan.chunks])) == list(range(tree.tree_tokens))
        for index, chunk in enumerate(plan.chunks):
            assert len(chunk) <= budget
            assert (tree.parent[chunk.tokens[1:]] == chunk.tokens[:-1]).all()
            assert tree.depth[chunk.tokens[0]] == chunk.first_depth
            assert chunk.parent < index
            assert last_ancestor(plan, index) == tree.parent[chunk.tokens[0]]
        assert plan.peak_tokens <= budget


def last_ancestor(plan: Plan, index: int) -> int:
    """Layout index of the token that a chunk hangs off, read from its parent's trunk; -1 at the top."""
    chunk = plan.chunks[index]
    if chunk.parent < 0:
        return -1
    parent = plan.chunks[chunk.parent]
    return int(parent.tokens[parent.trunk[chunk.first_depth - parent.first_depth - 1]])


def test_one_path_plan_refuses_a_budget_of_nothing(benchmark_module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(InvalidInputError, match="Expected at least 1"):
        benchmark_module("one_path").one_path_plan(PrefixTree.from_sequences([[1, 2]]), 0)


@pytest.mark.parametrize("name", BRANCHED)
def test_contenders_agree(benchmark_module: Callable[[str], ModuleType], name: str) -> None:
    module = benchmark_module("streamed_contenders")
    work = workload(benchmark_module, BRANCHED[name])
    budgets = {str(budget): budget for budget in (2, 5, 11)}
    examined = module.examine(module.contenders(tiny_model("qwen3"), tiny_model("qwen3"), work, budgets), 1e-5)
    assert len(examined) == 2 + 2 * len(budgets)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_contender_that_disagrees_is_noticed(benchmark_module: Callable[[str], ModuleType], factor: float) -> None:
    module = benchmark_module("streamed_contenders")
    model = tiny_model("qwen3")
    steps = module.contenders(model, tiny_model("qwen3"), workload(benchmark_module, star(3)), {"4": 4})
    right = steps["streamed 4"].step

    def spoilt() -> Plan:
        plan = right()
        model.lm_head.weight.grad *= factor
        return plan

    steps["streamed 4"] = module.Contender(model, spoilt)
    with pytest.raises(module.Disagreement, match="'streamed 4'"):
        module.examine(steps, 1e-4)


def test_saved_bytes_count_every_storage_once_and_no_parameter(benchmark_module: Callable[[str], ModuleType]) -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    saved = benchmark_module("streamed_contenders").SavedBytes(layer)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        x = torch.randn(8, 4, requires_grad=True)
        loss = (layer(x) + layer(x[:4]).sum()).sum()
    assert saved.live == saved.peak == x.nbytes
    loss.backward()
    del loss
    assert saved.live == 0
