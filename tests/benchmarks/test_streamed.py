"""The streaming benchmark runs, its contenders agree, and its one-path plan is one. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.streamed.one_path import one_path_plan
from dta_plugin import PrefixTree
from dta_plugin.execution.streaming.chunk_plan import ChunkPlan
from tests.benchmarks.running import smoke
from tests.support.trees import SHAPES

CONTENDERS = ["packed", "dense", *(f"{kind} 1/{n}" for n in (2, 4, 8) for kind in ("streamed", "one path"))]
PLAIN = ("packed", "dense", "streamed", "one path")


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    done = smoke("streamed", tmp_path)
    assert [row["name"] for row in done.result["rows"]] == ["star", "bushy", "comb"]
    for row in done.result["rows"]:
        assert list(row["examined"]) == CONTENDERS
        assert row["milliseconds"].keys() == row["over_packed"].keys() == set(CONTENDERS)
        assert list(row["one_path_over_streamed"]) == ["1/2", "1/4", "1/8"]
        for clock in ("wall", "cpu"):
            assert row["seconds"][clock].keys() == set(CONTENDERS) - {"dense"}
            assert all(len(seconds) == row["rounds"] == 2 for seconds in row["seconds"][clock].values())
        for name, examined in row["examined"].items():  # the model saw the tokens that the plan counts
            planned = examined["recomputed_tokens"] + examined["rebuilt_tokens"]
            assert examined["tokens"] == (row["flat_tokens"] if name == "dense" else row["tree_tokens"] + planned)
            assert examined["calls"] >= examined["chunks"]
            assert (examined["arena_bytes"] > 0) == (name not in ("packed", "dense"))
            assert 0 <= examined["error"] < 1e-4
    small, large = done.result["growth"]["rows"]
    assert small["longest_path"] == large["longest_path"]
    growth = {name: large["examined"][name]["saved_bytes"] / small["examined"][name]["saved_bytes"] for name in PLAIN}
    assert growth["packed"] > 2
    assert all(growth[name] < 1.1 for name in PLAIN if name != "packed"), growth
    assert len(done.result["checks"]) == 3 * 4
    for check in done.result["checks"]:
        assert f"{check['claim']}: {check['value']:.2f}, {'met' if check['met'] else 'NOT MET'}" in done.printed


@pytest.mark.parametrize("budget", [1, 4, 7, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_one_path_plans_are_single_paths_that_cover_the_tree(name: str, budget: int) -> None:
    tree = PrefixTree.from_sequences(SHAPES[name])
    plan = one_path_plan(tree, budget)
    assert sorted(np.concatenate([chunk.tokens for chunk in plan.chunks])) == list(range(tree.tree_tokens))
    for index, chunk in enumerate(plan.chunks):
        assert len(chunk) <= budget
        assert (tree.parent[chunk.tokens[1:]] == chunk.tokens[:-1]).all()
        assert tree.depth[chunk.tokens[0]] == chunk.first_depth
        assert chunk.parent < index
        assert last_ancestor(plan, index) == tree.parent[chunk.tokens[0]]
    assert plan.peak_tokens <= budget


def last_ancestor(plan: ChunkPlan, index: int) -> int:
    """Layout index of the token that a chunk hangs off, read from what its parent keeps in memory; -1 at the top."""
    chunk = plan.chunks[index]
    if chunk.parent < 0:
        return -1
    parent = plan.chunks[chunk.parent]
    return int(parent.tokens[parent.cached[chunk.first_depth - parent.first_depth - 1]])
