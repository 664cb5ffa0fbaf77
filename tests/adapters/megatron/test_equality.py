"""verl's Megatron engine and the plugin's: loss, gradient norm, log-probs, entropies, weights after updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from verl.utils.megatron_utils import unwrap_model

from dta_plugin.config import TreeConfig
from dta_plugin.tree.layout import ScoredEdges
from tests.adapters.megatron.faults import FAULTS, Fault
from tests.adapters.megatron.support import RECOMPUTATION, Setup, build, difference, differences, inferred, train
from tests.adapters.verl.support import ADDITIVE_LOSSES, AGGREGATIONS, Step, mini_batch, response_rows

TOLERANCE = 1e-5
UPDATES = [Step(), Step(shape="turns"), Step(shape="corners")]
STEPS = [
    *UPDATES,
    Step(shape="star", temperature=None),
    Step(shape="turns", dynamic=False, rows=3),
    Step(shape="turns", budget=30, stock_budget=90),  # stock verl needs a budget of the longest sequence
    Step(temperature=1.0),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("model", ["qwen3", "qwen2", "tied", "moe"])
def test_every_update_is_equal(model: str, packed: bool, folder: Path) -> None:
    found, results = differences(Setup(model, packed), STEPS, folder)
    assert max(found) < TOLERANCE, found
    for result in results:
        assert result["dta"]["dta/dense_fallback"] == 0
        assert result["dta"]["dta/compression_ratio"] > 1.2


@pytest.mark.parametrize("recomputed", RECOMPUTATION)
@pytest.mark.parametrize("model", ["qwen3", "moe"])
def test_recomputation(model: str, recomputed: str, folder: Path) -> None:
    found, _ = differences(Setup(model, transformer=RECOMPUTATION[recomputed]), UPDATES, folder)
    assert max(found) < TOLERANCE, found


OTHERWISE = {
    "plain optimizer": Setup(engine={"use_distributed_optimizer": False}),
    "sliding window": Setup(packed=False, transformer={"window_size": (6, 0), "window_attn_skip_freq": 2}),
    "softmax scale": Setup(transformer={"softmax_scale": 0.2}),
    "padded to buckets": Setup(engine={"pad_to_length": True, "pad_to_length_bucket": 64}),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_other_settings(what: str, folder: Path) -> None:
    found, _ = differences(OTHERWISE[what], UPDATES[:2], folder)
    assert max(found) < TOLERANCE, found


def test_entropies_in_chunks(folder: Path) -> None:
    """Of a log-prob pass; in an update verl's own function changes what its backward needs."""
    chunks = {"entropy_from_logits_with_chunking": True, "entropy_from_logits_chunk_size": 7}
    data = mini_batch(Step(shape="turns"))
    stock, tree = (inferred(build(Setup(engine=chunks), folder, tree), data)["entropy"] for tree in (False, True))
    found, expected = (response_rows(data, entropies).values() for entropies in (tree, stock))
    assert (found - expected).abs().max() < TOLERANCE


def test_every_policy_loss_and_aggregation(folder: Path) -> None:
    steps = [Step(loss_mode=loss) for loss in [*ADDITIVE_LOSSES, "geo_mean"]]
    steps += [Step(loss_agg_mode=mode) for mode in AGGREGATIONS[1:]]
    found, _ = differences(Setup(), steps, folder)
    assert max(found) < TOLERANCE, found


def test_bfloat16_is_no_further_from_the_truth(folder: Path) -> None:
    step = Step(shape="turns")
    (truth,) = train(build(Setup(), folder, tree=False), [step])
    stock, tree = (train(build(Setup(dtype="bfloat16"), folder, tree), [step])[0] for tree in (False, True))
    for name in ("log_probs", "entropies"):
        error, own = ((x[name].float() - truth[name]).abs().mean().item() for x in (tree, stock))
        assert error < 1.3 * own, name


def _only_the_first_sequence_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ScoredEdges.per_sequence

    def first_only(self: ScoredEdges, values: torch.Tensor) -> list[torch.Tensor]:
        return [row if i == 0 else row.detach() for i, row in enumerate(own(self, values))]

    monkeypatch.setattr(ScoredEdges, "per_sequence", first_only)


@pytest.mark.parametrize("break_it", [*FAULTS.values(), _only_the_first_sequence_has_gradients])
def test_negative_control(break_it: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    found, _ = differences(Setup(), [Step(shape="turns", config=TreeConfig(probe="off"))], folder)
    assert found[0] > 1000 * TOLERANCE, found


def test_min_saving_takes_verls_own_path(folder: Path) -> None:
    step = Step(config=TreeConfig(min_saving=0.99))
    stock, tree = (train(build(Setup(), folder, tree), [step])[0] for tree in (False, True))
    assert difference(tree, stock) == 0
    assert tree["dta"]["dta/dense_fallback"] == 1


def _add_adapters(engine: Any) -> None:
    """What LoRA does to a layer: something of its input is added to what it gives."""
    torch.manual_seed(1)
    for layer in unwrap_model(engine.module[0]).decoder.layers:
        for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1):
            down, up = torch.randn(4, linear.weight.shape[1]), torch.randn(linear.weight.shape[0], 4)

            def adapted(_: Any, args: Any, output: Any, down: torch.Tensor = down, up: torch.Tensor = up) -> Any:
                return output[0] + 0.05 * args[0] @ down.T @ up.T, output[1]

            linear.register_forward_hook(adapted)


def test_adapters_are_not_bypassed(folder: Path) -> None:
    """Whatever wraps linear layers; LoRA of Megatron-Bridge itself is in test_bridge.py."""
    data, found = mini_batch(Step(shape="turns")), []
    for tree in (False, True):
        engine = build(Setup(), folder, tree)
        before = inferred(engine, data)["log_probs"].values()
        _add_adapters(engine)
        found.append(response_rows(data, inferred(engine, data)["log_probs"]).values())
        assert (inferred(engine, data)["log_probs"].values() - before).abs().max() > 0.1
    stock, tree = found
    assert (tree - stock).abs().max() < TOLERANCE
