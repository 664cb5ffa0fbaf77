"""The benchmark runs, its contenders agree, and its ceilings are the published ones. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("prefix_grouper")

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CEILINGS = {"1024/64/8": 4.72, "1024/256/8": 2.51, "256/64/8": 2.58, "1024/64/2": 1.82, "128/512/8": 1.12}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [sys.executable, BENCHMARKS / "policy_update.py", "--smoke", "--output", path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text())


def test_result_says_where_it_comes_from(result):
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "accelerator"}
    assert result["versions"].keys() >= {"python", "torch", "transformers", "trl", "dta-plugin", "prefix-grouper"}
    assert result.keys() >= {"commit", "rounds", "clock", "device", "dtype", "model"}


def test_ceilings_of_the_star_rows(result):
    assert result["star_ceilings"] == pytest.approx(CEILINGS, abs=0.006)


def test_rows_hold_every_round_of_every_contender(result):
    assert [row["name"] for row in result["rows"]] == ["48/8/4", "8/24/3", "no sharing"]
    for row in result["rows"]:
        contenders = {"trl", "dense", "tree"} | ({"prefix_grouper"} if row["name"] != "no sharing" else set())
        for clock in ("wall", "cpu"):
            assert row["seconds"][clock].keys() == contenders
            assert all(len(times) == result["rounds"] for times in row["seconds"][clock].values())
        assert row["milliseconds"].keys() == contenders
        assert row["speed_up_over"].keys() == contenders - {"tree"}


def test_contenders_agree(result):
    assert all(0 <= error < 1e-4 for row in result["rows"] for error in row["error"].values())


@pytest.mark.parametrize("spoil", [lambda g: g * 1.001, lambda g: g * float("nan")])
def test_a_contender_that_disagrees_is_noticed(monkeypatch, spoil):
    monkeypatch.syspath_prepend(BENCHMARKS)
    policy_update = importlib.import_module("policy_update")
    outcome = policy_update.Outcome(torch.tensor(0.5), torch.randn(8), torch.rand(8))
    gradients = {"trl": {"a": torch.randn(4), "b": torch.randn(4)}}
    gradients["tree"] = {"a": gradients["trl"]["a"], "b": spoil(gradients["trl"]["b"])}
    error = policy_update._errors({"trl": outcome, "tree": outcome}, gradients)["tree"]
    assert not error <= policy_update.TOLERANCE[torch.float32]


def test_token_counts(result):
    star, _, unrelated = result["rows"]
    assert (star["flat_tokens"], star["tree_tokens"], star["scored_tokens"]) == (4 * 56, 48 + 4 * 8, 32)
    assert unrelated["flat_tokens"] == unrelated["tree_tokens"]
    assert unrelated["ceiling"] == pytest.approx(1.0)
