"""The balancing benchmark runs, weighs bins by the trees they hold, and its baselines do what they say. No timing is
asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dta_plugin import PrefixTree
from dta_plugin.balance.costs import TYPICAL, SequenceCosts, loads
from tests.support.trees import SHAPES, Sequences, comb, run, star

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BATCHES = {"16 x 4": (16, 64), "combs 6 x 2": (6, None), "one tree": (1, 24)}
BASELINES = {"contiguous", "longest first", "random"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--output", str(folder / "result.json"), "--plot", str(folder / "plots" / "result.png")]
    command = [sys.executable, str(BENCHMARKS / "balance.py"), "--smoke", *files]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads((folder / "result.json").read_text())
    return SimpleNamespace(printed=finished.stdout, result=result, plot=folder / "plots" / "result.png")


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def tree_tokens(sequences: Sequences, members: list[int]) -> int:
    return PrefixTree.from_sequences([sequences[s] for s in members]).tree_tokens if members else 0


def test_result_says_where_it_comes_from(done: SimpleNamespace) -> None:
    assert done.result.keys() >= {"benchmark", "commit", "machine", "versions", "model"}
    assert done.result["large"].keys() == {"sequences", "tokens", "bins", "wall", "cpu"}
    assert done.plot.read_bytes().startswith(b"\x89PNG")


def test_rows_hold_every_contender(done: SimpleNamespace) -> None:
    rows = done.result["rows"]
    assert [(row["name"], row["bins"]) for row in rows] == [(name, bins) for name in BATCHES for bins in (2, 4)]
    for row in rows:
        groups, sequences = BATCHES[row["name"]]
        assert row["groups"] == groups and row["sequences"] == (sequences or row["sequences"])
        assert row["tree_tokens"] < row["flat_tokens"]
        divides = row["sequences"] % row["bins"] == 0
        assert row["contenders"].keys() == {"ours"} | BASELINES | ({"equal counts"} if divides else set())
        for result in row["contenders"].values():
            assert result["over_bound"] == pytest.approx(result["max_load"] / row["lower_bound"])
            assert result["over_bound"] >= 1 - 1e-9 and result["repeated"] >= -1e-9
            fewest, most = result["sequences"]
            assert fewest <= row["sequences"] / row["bins"] <= most
        if divides:
            assert row["contenders"]["equal counts"]["sequences"] == [row["sequences"] // row["bins"]] * 2


def test_checks_are_printed(done: SimpleNamespace) -> None:
    assert len(done.result["checks"]) == 2 + 3 + 1 + 1
    for check in done.result["checks"]:
        assert check["met"] == (not check["exceptions"])
        assert f"{check['claim']}: worst {check['worst']:.4f}, {'met' if check['met'] else 'NOT MET'}" in done.printed
        assert all(f"    {exception}\n" in done.printed for exception in check["exceptions"])


def test_an_exception_is_reported_and_a_tie_may_be_one(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    report = benchmark_module("balance_report")
    contender = {"max_load": 2.0, "over_bound": 2.0}
    better = {name: {"max_load": 3.0} for name in BASELINES - {"contiguous"}}
    row = {"name": "a", "groups": 9, "bins": 2, "lower_bound": 1.0}
    row["contenders"] = {"ours": contender, "contiguous": contender, **better}
    large = {"sequences": 1, "tokens": 1, "bins": 1, "cpu": 0.0}
    found = report.checks([row], large)
    assert [check["met"] for check in found] == [False, None, False, True, True, None, True]
    assert found[0]["exceptions"] == ["a in 2 bins: 2.0000"] and found[2]["exceptions"] == ["a in 2 bins: 1.0000"]
    assert report.shown(found[1]).endswith("no such row")
    at_bound = report.checks([row | {"lower_bound": 2.0}], large)[2]
    assert at_bound["rows"] == 0 and "but for 1 rows with both at the lower bound" in at_bound["claim"]


@pytest.mark.parametrize("shape", SHAPES)
def test_loads_are_what_the_trees_of_the_bins_cost(benchmark_module: Callable[[str], ModuleType], shape: str) -> None:
    rows = [np.array(sequence) for sequence in SHAPES[shape]]
    for name, deal in benchmark_module("balance_contenders").contenders(rows, 3).items():
        bins = deal()
        assert sorted(s for members in bins for s in members) == list(range(len(rows))), name
        for members, load in zip(bins, loads(SequenceCosts.from_sequences(rows), bins), strict=True):
            tree = PrefixTree.from_sequences([rows[s] for s in members]) if members else None
            expected = TYPICAL.flops(tree.tree_tokens, tree.depth, 0) if tree else 0.0
            assert load == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bins", [1, 2, 3, 5])
@pytest.mark.parametrize("name", [*SHAPES, "uneven"])
def test_contiguous_is_the_best_way_to_cut_between_leaves(
    benchmark_module: Callable[[str], ModuleType], name: str, bins: int
) -> None:
    shapes = SHAPES | {"uneven": [*star(5, prefix=40, branch=7), *([9, *sequence] for sequence in star(3)), run(25)]}
    sequences = shapes[name][:12]
    found = benchmark_module("balance_contenders").contiguous([np.array(s) for s in sequences], bins)
    assert sorted(s for members in found for s in members) == list(range(len(sequences)))
    costliest = max(tree_tokens(sequences, members) for members in found)
    bisection = 1e-4 * tree_tokens(sequences, list(range(len(sequences))))
    assert costliest <= best_cut(sequences, bins) + bisection


def best_cut(sequences: Sequences, bins: int) -> int:
    """Tree tokens of the costliest piece, of all ways to cut sorted sequences after leaves."""
    ordered = sorted(sequences)
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b[: len(a)] != a]
    best = tree_tokens(ordered, list(range(len(ordered))))
    for count in range(1, min(bins, len(ends) + 1)):
        for cuts in combinations(ends, count):
            pieces = zip([0, *cuts], [*cuts, len(ordered)], strict=True)
            best = min(best, max(tree_tokens(ordered, list(range(a, b))) for a, b in pieces))
    return best


def test_a_turn_goes_with_the_one_that_continues_it(benchmark_module: Callable[[str], ModuleType]) -> None:
    chains = [np.array([1200 + i, *sequence]) for i in range(3) for sequence in comb(5)]
    for members in benchmark_module("balance_contenders").contiguous(chains, 3):
        assert len(members) == 5 and len({s // 5 for s in members}) == 1


def test_longest_first_ignores_what_is_shared(benchmark_module: Callable[[str], ModuleType]) -> None:
    rows = [np.array(row) for row in (run(8), run(7), run(6), run(5))]  # one chain
    assert benchmark_module("balance_contenders").longest_first(rows, 2) == [[0, 3], [1, 2]]


def test_workloads_share_what_they_should(benchmark_module: Callable[[str], ModuleType]) -> None:
    module = benchmark_module("balance_workloads")
    batch = module.stars("", module.Lengths(1 / 16), 4, 3, system=160)
    assert len(batch.sequences) == 12 and len({tuple(s[:10]) for s in batch.sequences}) == 1
    tree = module.giant("", module.Lengths(1 / 16), 20)
    assert len({len(s) for s in tree.sequences}) > 5 and len({tuple(s[:32]) for s in tree.sequences}) == 1
    again = module.giant("", module.Lengths(1 / 16), 20)
    assert all(np.array_equal(a, b) for a, b in zip(tree.sequences, again.sequences, strict=True))
