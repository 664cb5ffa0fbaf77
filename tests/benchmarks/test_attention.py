"""The attention benchmark runs on the CPU and counts what it should. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dta_plugin import PrefixTree
from dta_plugin.attention import TreeMask
from dta_plugin.tree.layout import TreeLayout
from tests.benchmarks.running import smoke

STARS = {"24/8/4": (24, 8, 4), "8/24/3": (8, 24, 3)}
FLOP = {"forward": 4, "backward": 10, "total": 14}  # per visible pair, query head and dimension
UNSHARED = {"no sharing": [32, 32, 32], "no sharing, mixed lengths": [8, 16, 40]}


def _tree_pairs(name: str) -> int:
    """Counted on the mask itself, for other tokens of the same shape."""
    if name in STARS:
        prompt, completion, group = STARS[name]
        sequences = [[1] * prompt + [2 + i] * completion for i in range(group)]
    else:
        sequences = [[i] * length for i, length in enumerate(UNSHARED[name])]
    layout = TreeLayout.from_tree(PrefixTree.from_sequences(sequences))
    return int(TreeMask.from_layout(layout).visible().sum())


def _dense_pairs(name: str) -> int:
    lengths = [sum(STARS[name][:2])] * STARS[name][2] if name in STARS else UNSHARED[name]
    return sum(int(torch.ones(length, length).tril().sum()) for length in lengths)


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    done = smoke("attention", tmp_path, "--device", "cpu")
    heads = done.result["heads"]
    assert done.result["matmul_tflops"] > 0 and done.result["error"]["tree"] < 2e-2
    assert [row["name"] for row in done.result["rows"]] == [*STARS, *UNSHARED]
    for row in done.result["rows"]:
        assert row["ceiling"] == pytest.approx(_dense_pairs(row["name"]) / _tree_pairs(row["name"]))
        for contender, pairs in (("tree", _tree_pairs(row["name"])), ("dense flash", _dense_pairs(row["name"]))):
            measured = row["contenders"][contender]
            per_pair = heads["dim"] * heads["query"]
            assert measured["visible_pairs"] == pairs
            assert measured["flop"] == {part: n * per_pair * pairs for part, n in FLOP.items()}
            for part, rate in measured["tflops"].items():
                assert rate == pytest.approx(measured["flop"][part] / measured["milliseconds"][part] / 1e9)
            assert all(len(times) == row["rounds"] == 2 for times in measured["runs"].values())
        assert all("CPU" in row["contenders"][name]["unavailable"] for name in ("flex", "varlen flash"))
        assert row["speed_up_over"].keys() == {"dense flash"}
    assert [check["met"] is None for check in done.result["checks"]] == [False, False, False, False, True, True]
    assert "24/8/4: at least 5x faster than dense flash (ceiling " in done.printed
    assert "no sharing: at most 1.15x varlen flash's time: not measured" in done.printed
