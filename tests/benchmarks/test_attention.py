"""The attention benchmark runs on the CPU, counts what it should and survives a full memory. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dta_plugin import PrefixTree
from dta_plugin.attention import TreeMask
from dta_plugin.tree.layout import TreeLayout

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STARS = {"24/8/4": (24, 8, 4), "8/24/3": (8, 24, 3)}
FLOP = {"forward": 4, "backward": 10, "total": 14}  # per visible pair, query head and dimension
UNSHARED = {"no sharing": [32, 32, 32], "no sharing, mixed lengths": [8, 16, 40]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [sys.executable, BENCHMARKS / "attention.py", "--device", "cpu", "--smoke", "--output", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(printed=done.stdout, result=json.loads(path.read_text()))


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


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


def test_result_says_where_it_comes_from(run):
    assert run.result.keys() >= {"commit", "machine", "versions", "device", "dtype", "heads", "seed", "matmul_tflops"}
    assert run.result["matmul_tflops"] > 0


def test_rows_count_visible_pairs_and_flops(run):
    heads = run.result["heads"]
    assert [row["name"] for row in run.result["rows"]] == [*STARS, *UNSHARED]
    for row in run.result["rows"]:
        assert row["ceiling"] == pytest.approx(_dense_pairs(row["name"]) / _tree_pairs(row["name"]))
        for contender, pairs in (("tree", _tree_pairs(row["name"])), ("dense flash", _dense_pairs(row["name"]))):
            measured = row["contenders"][contender]
            per_pair = heads["dim"] * heads["query"]
            assert measured["visible_pairs"] == pairs
            assert measured["flop"] == {part: n * per_pair * pairs for part, n in FLOP.items()}
            for part, rate in measured["tflops"].items():
                assert rate == pytest.approx(measured["flop"][part] / measured["milliseconds"][part] / 1e9)
            assert all(len(times) == row["rounds"] == 2 for times in measured["runs"].values())


def test_ops_that_need_a_gpu_say_so_and_the_rest_is_reported(run):
    for row in run.result["rows"]:
        assert "CPU" in row["contenders"]["flex"]["unavailable"]
        assert "CPU" in row["contenders"]["varlen flash"]["unavailable"]
        assert row["speed_up_over"].keys() == {"dense flash"}
    assert run.result["error"]["tree"] < 2e-2
    assert [check["met"] is None for check in run.result["checks"]] == [False, False, False, False, True, True]
    assert "24/8/4: at least 5x faster than dense flash (ceiling " in run.printed
    assert "no sharing: at most 1.15x varlen flash's time: not measured" in run.printed


def test_a_batch_that_does_not_fit_is_cut(benchmark_module, monkeypatch):
    contenders = benchmark_module("attention_contenders")
    setting = contenders.Setting(2, 1, 16, torch.device("cpu"), torch.bfloat16)
    dense = contenders.dense_attend

    def two_rows_fit(q, k, v):
        if len(q) > 2:
            raise torch.OutOfMemoryError
        return dense(q, k, v)

    monkeypatch.setattr(contenders, "dense_attend", two_rows_fit)
    tree = PrefixTree.from_sequences([[1] * 8 + [2 + i] * 4 for i in range(5)])
    contender, _ = contenders.warmed_up(contenders.candidates(tree, setting)["dense flash"])
    assert [len(call.q) for call in contender.calls] == [2, 2, 1]
    assert contender.pairs == tree.flat_visible_pairs()
    assert "OOM as one batch of 5" in contender.note

    monkeypatch.setattr(contenders, "dense_attend", lambda q, k, v: two_rows_fit(torch.cat([q] * 3), k, v))
    assert contenders.warmed_up(contenders.candidates(tree, setting)["dense flash"]) == "OOM"


@pytest.mark.parametrize("spoil", [lambda x: x * 1.05, lambda x: x * float("nan")])
def test_a_wrong_op_is_noticed(benchmark_module, monkeypatch, spoil):
    agreement: ModuleType = benchmark_module("attention_agreement")
    contenders = benchmark_module("attention_contenders")
    setting = contenders.Setting(2, 1, 16, torch.device("cpu"), torch.bfloat16)
    assert agreement.errors_to_dense(setting)["tree"] < agreement.TOLERANCE

    right = agreement.tree_attend
    monkeypatch.setattr(agreement, "tree_attend", lambda *where: lambda q, k, v: spoil(right(*where)(q, k, v)))
    with pytest.raises(agreement.Disagreement, match="tree differs"):
        agreement.errors_to_dense(setting)


def _packed_sdpa(q, k, v, bounds):
    spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    rows = [[x[start:stop].transpose(0, 1)[None] for x in (q, k, v)] for start, stop in spans]
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*row, is_causal=True, enable_gqa=True)[0].transpose(0, 1) for row in rows])


def _in_torch_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return _packed_sdpa(q, k, v, cu_seq_q)


def _in_torch_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return _packed_sdpa(q, k, v, cu_seq_q)


def _in_torch_2_13(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0) and enable_gqa
    return _packed_sdpa(q, k, v, cu_seq_q)


@pytest.mark.parametrize("varlen_attn", [_in_torch_2_10, _in_torch_2_11, _in_torch_2_13])
def test_varlen_is_called_as_each_torch_wants_it(benchmark_module, monkeypatch, varlen_attn):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    contenders = benchmark_module("attention_contenders")
    setting = contenders.Setting(2, 1, 16, torch.device("cpu"), torch.bfloat16)
    assert benchmark_module("attention_agreement").errors_to_dense(setting)["varlen flash"] < 2e-2


def test_published_figures_stand_beside_ours_and_missing_ones_show(benchmark_module):
    report = benchmark_module("attention_report")
    tree = {"milliseconds": {"total": 100.0}}
    row = {"name": "65536/2048/16", "contenders": {"tree": tree, "dense flash": {"unavailable": "OOM"}}}
    assert "| 65536/2048/16 | A100      | OOM    | 1357.8" in report.published_table([row])
    assert report.published_table([{"name": "1/2/3", "contenders": row["contenders"]}]) is None
