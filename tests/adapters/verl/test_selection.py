"""Token selection: over all that can be drawn, verl's loss, metrics and gradient are on average those of all tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin import tokens
from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.adapters.verl_plugin.losses import POLICY_LOSSES
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.token_selection.select import Drawn, TokenSelection
from dta_plugin.training import tokens as drawing
from dta_plugin.training.notices import Notices
from tests.adapters.verl.support import AGGREGATIONS, Setup, Step, actor_config, build
from tests.adapters.verl.updates import Update, relative, sampled, updated

TOLERANCE = 1e-5
TOKEN_SUMS = {name for name, traits in POLICY_LOSSES.items() if traits.is_token_sum}
LOSSES = sorted(TOKEN_SUMS & POLICY_LOSS_REGISTRY.keys())
ALL_AGGREGATIONS = [*AGGREGATIONS, "seq-mean-token-sum-norm"]
Draws = list[tuple[float, np.ndarray]]


@pytest.fixture(scope="module")
def engine(folder: Path) -> TreeEngine:
    return build(Setup(), folder, tree=True)


@pytest.fixture(scope="module")
def data(engine: TreeEngine) -> TensorDict:
    return sampled(engine, Step(shape="few"))


def _chosen(scheme: str) -> TreeConfig:
    return TreeConfig(token_selection=scheme, token_budget=0.6)


def _carries(data: TensorDict) -> np.ndarray:
    return data["response_mask"].to_padded_tensor(0).bool().numpy()


def _every_draw(scheme: str, carries: np.ndarray) -> Draws:
    """All that can be drawn for the rows, each with its probability: weights [B, C]."""
    options = TokenSelection(scheme=scheme, budget=0.6)
    rows = [_every_draw_of_row(options, row) for row in carries]
    return [
        (float(np.prod([share for share, _ in draws])), np.stack([weights for _, weights in draws]))
        for draws in itertools.product(*rows)
    ]


def _every_draw_of_row(options: TokenSelection, carries: np.ndarray) -> Draws:
    places = np.flatnonzero(carries)
    candidates = np.arange(places[-1] + 1) if options.cuts else places
    p = options.design(len(candidates)).probabilities
    if options.cuts:
        ends = np.append(p, 0.0)
        kept = [(ends[cut - 1] - ends[cut], np.arange(len(p)) < cut) for cut in range(1, len(p) + 1)]
    else:
        subsets = (np.array(bits, dtype=bool) for bits in itertools.product((False, True), repeat=len(p)))
        kept = [(float(np.prod(np.where(bits, p, 1 - p))), bits) for bits in subsets]
    draws = []
    for share, bits in kept:
        weights = np.zeros(len(carries))
        weights[candidates] = bits / p
        draws.append((share, weights * carries))
    return [(share, weights) for share, weights in draws if share > 0]


def _fixed(monkeypatch: pytest.MonkeyPatch, weights: np.ndarray) -> None:
    def drawn(options: TokenSelection, carries: np.ndarray, *_: object, **__: object) -> Drawn:
        return Drawn(weights, np.ones(carries.shape), carries, (0, 0, 0))

    monkeypatch.setattr(drawing, "draw", drawn)


def _mean(updates: Iterator[tuple[float, Update]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Metrics and gradient, by probability."""
    parts = [(share * update.numbers, share * update.gradient.double()) for share, update in updates]
    numbers, gradients = zip(*parts, strict=True)
    return sum(numbers), sum(gradients)  # type: ignore[return-value]


def _enumerated(
    engine: TreeEngine, data: TensorDict, scheme: str, step: Step, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[float, Update]]:
    for share, weights in _every_draw(scheme, _carries(data)):
        _fixed(monkeypatch, weights)
        yield share, updated(engine, data, _chosen(scheme), actor_config(step))


def test_what_is_enumerated_is_everything(data: TensorDict) -> None:
    carries = _carries(data)
    for scheme in ("rpc", "rpc-two-point", "urs"):
        draws = _every_draw(scheme, carries)
        assert sum(share for share, _ in draws) == pytest.approx(1.0)
        assert np.allclose(sum(share * weights for share, weights in draws), carries)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_aggregation_on_average(
    loss: str, engine: TreeEngine, data: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With KL and entropy, and a turn of a tool in every row."""
    for aggregation in ALL_AGGREGATIONS:
        step = Step(loss_mode=loss, loss_agg_mode=aggregation)
        full = updated(engine, data, TreeConfig(), actor_config(step))
        numbers, gradient = _mean(_enumerated(engine, data, "rpc", step, monkeypatch))
        torch.testing.assert_close(numbers, full.numbers, rtol=TOLERANCE, atol=1e-7, msg=f"{full.metrics} {numbers}")
        assert relative(gradient, full.gradient.double()) < TOLERANCE, aggregation


@pytest.mark.parametrize("scheme", ["urs", "rpc-uniform", "rpc-two-point"])
def test_every_scheme_on_average(
    scheme: str, engine: TreeEngine, data: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = updated(engine, data, TreeConfig())
    numbers, gradient = _mean(_enumerated(engine, data, scheme, Step(), monkeypatch))
    torch.testing.assert_close(numbers, full.numbers, rtol=TOLERANCE, atol=1e-7)
    assert relative(gradient, full.gradient.double()) < TOLERANCE


def _self_normalised(weights: np.ndarray, carries: np.ndarray) -> np.ndarray:
    """Every row's weights add up to its tokens."""
    return weights * carries.sum(1, keepdims=True) / weights.sum(1, keepdims=True)


def _always_the_same_prefix(weights: np.ndarray, carries: np.ndarray) -> np.ndarray:
    kept = carries & (np.arange(carries.shape[1]) < 2)
    return kept * (carries.sum(1, keepdims=True) / kept.sum(1, keepdims=True))


@pytest.mark.parametrize("biased", [_self_normalised, _always_the_same_prefix])
def test_negative_control(
    biased: Callable[[np.ndarray, np.ndarray], np.ndarray],
    engine: TreeEngine,
    data: TensorDict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = updated(engine, data, TreeConfig())

    def updates() -> Iterator[tuple[float, Update]]:
        for share, weights in _every_draw("rpc", _carries(data)):
            _fixed(monkeypatch, biased(weights, _carries(data)))
            yield share, updated(engine, data, _chosen("rpc"))

    _, gradient = _mean(updates())
    assert relative(gradient, full.gradient.double()) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"token_selection": "rpc", "token_budget": 1.0},
        {"token_selection": "rpc", "token_min_prefix": 100},
        {"token_selection": "urs", "token_budget": 1.0},
    ],
)
def test_all_tokens_are_the_baseline_bit_by_bit(options: dict[str, Any], engine: TreeEngine) -> None:
    data = sampled(engine, Step(shape="turns"))
    full, chosen = (updated(engine, data, config) for config in (TreeConfig(), TreeConfig(**options)))
    assert torch.equal(full.numbers, chosen.numbers)
    assert torch.equal(full.gradient, chosen.gradient)
    assert [chosen.metrics[f"dta/{name}"] for name in ("kept_fraction", "max_weight", "mean_weight")] == [1, 1, 1]
    assert chosen.metrics["dta/effective_sample_size"] == pytest.approx(1.0)
    assert chosen.metrics["dta/predicted_variance"] == 0


def test_what_is_cut_is_not_computed(engine: TreeEngine) -> None:
    """Fewer tokens, and fewer micro-batches; every pass draws anew, and single tokens save only the LM head."""
    data = sampled(engine, Step(budget=48))
    full, first, second, single = (
        updated(engine, data, TreeConfig(**options))
        for options in ({}, *[{"token_selection": "rpc", "token_budget": 0.3}] * 2, {"token_selection": "urs"})
    )
    assert first.metrics["dta/tree_tokens"] < full.metrics["dta/tree_tokens"]
    assert first.metrics["dta/micro_batches"] < full.metrics["dta/micro_batches"]
    assert first.metrics["dta/pruned_tokens"] > 20
    total = full.metrics["dta/flat_tokens"]
    assert total == 16 * 21.5 + data["responses"].offsets()[-1]
    for update in (first, second, single):
        assert update.metrics["dta/flat_tokens"] + update.metrics["dta/pruned_tokens"] == total
        assert 0 < update.metrics["dta/kept_fraction"] < 1 < update.metrics["dta/max_weight"]
        assert update.metrics["dta/effective_sample_size"] < 1
        assert 0 < update.metrics["dta/predicted_variance"] <= 1 / 0.24 - 1  # rpc at 0.3: a floor of 0.24
    assert first.metrics["loss"] != second.metrics["loss"]


def test_static_micro_batches_and_padded_rows(engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own micro-batches, and the layout of the older trainer, take the weights along."""
    monkeypatch.setattr(tokens.OptimizerPasses, "next", lambda *_: 3)
    step = Step(dynamic=False, rows=3, shape="turns")
    data = sampled(engine, step)
    expected = updated(engine, data, _chosen("rpc"))
    static = updated(engine, data, replace(_chosen("rpc"), regroup="never"))
    padded = updated(engine, _padded(data), _chosen("rpc"))
    for found in (static, padded):
        assert relative(found.gradient, expected.gradient) < TOLERANCE
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=TOLERANCE)
        assert found.metrics["dta/pruned_tokens"] == expected.metrics["dta/pruned_tokens"]


def _padded(data: TensorDict) -> TensorDict:
    """As `left_right_2_no_padding` leaves a batch of trainer.use_v1=False."""
    data = data.copy()
    prompts = data["prompts"].unbind()
    width, response = max(map(len, prompts)), int(data["responses"].offsets().diff().max())
    mask = torch.zeros(len(data), width + response, dtype=torch.long)
    for row, begin, length in zip(mask, map(len, prompts), data["responses"].offsets().diff().tolist(), strict=True):
        row[width - begin : width + length] = 1
    data["prompts"] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in prompts])
    data["attention_mask"] = mask
    for key in ("responses", "response_mask", "old_log_probs", "ref_log_prob", "advantages"):
        data[key] = data[key].to_padded_tensor(0)
    tu.assign_non_tensor(data, max_response_len=response)
    return data


@pytest.mark.parametrize("options", [{"on_unsupported": "dense"}, {"min_saving": 0.99}])
def test_verls_own_path_weighs_too(
    options: dict[str, Any], engine: TreeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It computes everything, and says so once; the loss is that of the same drawing."""
    monkeypatch.setattr(tokens.OptimizerPasses, "next", lambda *_: 3)
    monkeypatch.setattr(engine, "_dta_notices", Notices())
    data = sampled(engine, Step(shape="turns", budget=10_000))  # verl averages some metrics over micro-batches
    expected = updated(engine, data, _chosen("rpc"))
    if "on_unsupported" in options:
        tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = [updated(engine, data, replace(_chosen("rpc"), **options)) for _ in range(2)]
    for update in found:
        assert update.metrics["dta/dense_fallback"] == 1 and update.metrics["dta/pruned_tokens"] == 0
        assert update.metrics["dta/kept_fraction"] == expected.metrics["dta/kept_fraction"]
        torch.testing.assert_close(update.numbers, expected.numbers, rtol=TOLERANCE, atol=1e-6)
        assert relative(update.gradient, expected.gradient) < TOLERANCE
    assert caplog.text.count("saves nothing") == 1


def test_cost_of_the_gate_counts_what_is_cut(engine: TreeEngine) -> None:
    """With a small budget the tree saves more than sharing alone does."""
    data = sampled(engine, Step())
    ran = []
    for selected in ({}, {"token_selection": "rpc", "token_budget": 0.11, "token_floor": 0.1}):
        update = updated(engine, data, TreeConfig(min_saving=0.62, **selected))
        ran.append(update.metrics["dta/dense_fallback"])
    assert ran == [1, 0]


def test_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens.OptimizerPasses, "next", lambda *_: 3)
    engine = build(Setup(), folder, tree=True)
    data = sampled(engine, Step(shape="turns"))
    packed = updated(engine, data, _chosen("rpc"))
    chunks = replace(_chosen("rpc"), executor="streamed", max_tree_tokens_per_chunk=20)
    streamed = updated(engine, data, chunks)
    assert streamed.metrics["dta/streamed"] == 1
    assert relative(streamed.gradient, packed.gradient) < TOLERANCE


def test_passes_are_numbered_alike_after_a_resume() -> None:
    steps = [0, 0, 0, 1, 1, 2]
    whole, resumed = tokens.OptimizerPasses(), tokens.OptimizerPasses()
    numbers = [whole.next(scheduled) for scheduled in steps]
    assert len(set(numbers)) == len(steps)
    assert [resumed.next(scheduled) for scheduled in steps[3:]] == numbers[3:]


def test_drawn_by_seed_pass_and_rank(engine: TreeEngine, data: TensorDict, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    draw = drawing.draw

    def watched(options: Any, carries: Any, groups: Any, **numbers: int) -> Drawn:
        seen.append((list(groups), numbers))
        return draw(options, carries, groups, **numbers)

    monkeypatch.setattr(drawing, "draw", watched)
    monkeypatch.setattr(engine, "_dta_passes", tokens.OptimizerPasses())
    actor = replace(actor_config(Step()), data_loader_seed=5)
    for _ in range(2):
        updated(engine, data, _chosen("rpc"), actor)
    engine.lr_scheduler_step()  # as verl does after the last mini-batch of a step
    updated(engine, data, _chosen("rpc"), actor)
    assert seen == [([0, 0], {"seed": 5, "step": step, "rank": 0}) for step in (0, 1, 2**20)]
    seen.clear()
    updated(engine, sampled(engine, Step()), _chosen("rpc"))
    assert seen[0][0] == [0, 1, 2, 3] * 4


REFUSED = sorted(POLICY_LOSS_REGISTRY.keys() - TOKEN_SUMS)


@pytest.mark.parametrize("loss", REFUSED)
def test_losses_that_read_several_tokens_raise(loss: str, engine: TreeEngine, data: TensorDict) -> None:
    config = replace(_chosen("rpc"), on_unsupported="dense")
    with pytest.raises(InvalidInputError, match=f"policy_loss.loss_mode={loss}, .*token_selection=all"):
        updated(engine, data, config, actor_config(Step(loss_mode=loss)))
    updated(engine, data, TreeConfig(), actor_config(Step(loss_mode=loss)))


def test_other_updates_raise(engine: TreeEngine, data: TensorDict) -> None:
    def my_loss(**_: Any) -> None:
        """Unknown."""

    engine.configure(_chosen("urs"))
    with pytest.raises(InvalidInputError, match="token_selection=urs with the loss function my_loss"):
        engine.forward_backward_batch(data.copy(), my_loss)
    wants_all = data.copy()
    tu.assign_non_tensor(wants_all, return_model_output=True)
    with pytest.raises(InvalidInputError, match="return_model_output"):
        updated(engine, wants_all, _chosen("urs"))


def test_other_passes_stay_full(engine: TreeEngine, data: TensorDict) -> None:
    """Old log-probs and those of the reference."""
    results = []
    for config in (TreeConfig(), _chosen("rpc")):
        engine.configure(config)
        with engine.eval_mode():
            results.append(engine.infer_batch(data.copy(), loss_function=None)["model_output"]["log_probs"].values())
    assert torch.equal(*results)
