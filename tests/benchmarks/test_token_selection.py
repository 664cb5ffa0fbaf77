"""The benchmarks of token selection run, and gradients are what they have to be. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.running import PNG, python, smoke

CONTENDERS = ["dense", "tree", "rpc", "urs"]
NAMES = ["all tokens", "rpc 50 %", "rpc 50 %, floor 0.1", "urs 50 %"]


@pytest.mark.long
def test_updates(tmp_path: Path) -> None:
    """24 prompt tokens, 4 completions of 16; urs runs up to each row's last kept token."""
    (row,) = smoke("token_selection.updates", tmp_path).result["rows"]
    assert list(row["updates"]) == CONTENDERS
    assert row["rounds"] == {"dense": 2, "tree": 2, "rpc": 8, "urs": 8}
    for seconds in row["seconds"].values():
        assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(CONTENDERS, 2)
    assert row["faster_than"].keys() == {"dense", "tree"}
    assert all(faster.keys() == set(CONTENDERS) for faster in row["faster_than"].values())

    sizes = {name: [update["size"] for update in updates] for name, updates in row["updates"].items()}
    assert [sizes["dense"][0][key] for key in ("flat_tokens", "tree_tokens", "scored_tokens")] == [160, None, 64]
    assert [sizes["tree"][0][key] for key in ("flat_tokens", "tree_tokens", "scored_tokens")] == [160, 88, 64]
    for size in sizes["rpc"]:
        assert size["tree_tokens"] == 24 + size["scored_tokens"] == 24 + round(64 * size["kept_fraction"])
    for size in sizes["urs"]:
        assert size["scored_tokens"] == round(64 * size["kept_fraction"])
        assert 24 + size["scored_tokens"] <= size["tree_tokens"] <= 88
    assert len({size["kept_fraction"] for size in sizes["rpc"]}) > 1, "every run draws anew"

    most = {name: max(update["saved_bytes"] for update in updates) for name, updates in row["updates"].items()}
    assert most["rpc"] < most["tree"] < most["dense"]
    assert row["error"].keys() == {"dense", "tree", "rpc, budget 1", "urs, budget 1"}
    assert row["error"]["dense"] < 1e-4 and max(row["error"][f"{name}, budget 1"] for name in ("rpc", "urs")) < 1e-6
    for found in row["gradient"].values():
        assert found["drawings"] == 8 and found["one"] > 0.1
        assert found["mean"] < 3 * found["expected"]


@pytest.mark.long
def test_learning(tmp_path: Path) -> None:
    """On a model that is hardly trained, whose rewards may all be 0."""
    pytest.importorskip("trl")
    python("recipes/quickstart/build.py", "--output", str(tmp_path), "--steps", "10", "--prompts", "32")
    plot = tmp_path / "plots" / "result.png"
    options = ["--folder", str(tmp_path), "--workers", "1", "--plot", str(plot)]
    done = smoke("token_selection.learning", tmp_path, *options)
    assert [run["name"] for run in done.result["runs"]] == NAMES
    for run in done.result["runs"]:
        series = ("reward", "grad_norm", "tree_tokens", "kept_fraction", "seconds", "saved_bytes")
        assert [len(run[name]) for name in series] == [2] * len(series)
        assert run["name"] in done.printed
    assert len({run["reward"][0] for run in done.result["runs"]}) == 1, "the first step samples from the same model"
    assert plot.read_bytes().startswith(PNG)
