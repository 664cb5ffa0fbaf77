"""The trajectory objective's update without any framework: parts add up, and all it tells is known."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dta_plugin.training.diffusion.batch import DiffusionBatch, Rollout
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import PREFIX, Statistics
from dta_plugin.training.diffusion.trajectory import TrajectoryObjective
from dta_plugin.training.diffusion.update import MicroStep, back_propagated
from dta_plugin.training.metrics import METRICS
from tests.support.enumerated_elbo import Batch, Gradients, largest_difference, make_batch
from tests.support.tiny_diffusion import FAMILY, MASK

CPU = torch.device("cpu")
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -1.5, 0.75])
ALL, EPSILON, BETA = slice(None), 0.2, 0.3


@pytest.fixture(scope="module")
def rows() -> Batch:
    return make_batch()


def batch_of(rows: Batch, which: slice = ALL) -> DiffusionBatch:
    """Completions of 6, 3, 8, 1 and 5 tokens, written two at a time from right to left; nothing behind them."""
    canvas = rows.input_ids[:, -rows.width :].clone()
    behind = torch.arange(rows.width) >= rows.lengths[:, None]
    steps = (torch.arange(rows.width).flip(0) // 2).expand(canvas.shape).masked_fill(behind, -1)
    return DiffusionBatch(
        rows.input_ids[which],
        rows.attention_mask[which],
        rows.width,
        torch.arange(100, 105)[which],
        Rollout(canvas.masked_fill(behind, MASK)[which], steps[which]),
    )


def objective(samples: int = 3, beta: float = 0.0) -> TrajectoryObjective:
    options = DiffusionOptions(objective="trajectory", num_elbo_samples=samples)
    return TrajectoryObjective(options, FAMILY, nullcontext, 8, EPSILON, beta)


def updated(own: TrajectoryObjective, rows: Batch, step: MicroStep) -> tuple[Gradients, Statistics]:
    update = own.update(rows.model, step)
    back_propagated(update.losses(), own.passes, lambda loss: loss.backward(), nullcontext(), CPU).backward()
    return rows.take_gradients(), update.statistics()


def told(statistics: Statistics) -> dict[str, float]:
    return statistics.over_ranks(lambda own: own[None], CPU)


def test_the_clipped_ratios_in_one_graph(rows: Batch) -> None:
    own, batch = objective(beta=BETA), batch_of(rows)
    stored = own.stored(rows.model, batch)
    moved = 0.4 * torch.cos(torch.arange(15.0)).view(5, 3)
    old, reference = stored - moved, stored + moved / 2
    found, statistics = updated(own, rows, MicroStep(batch, ADVANTAGES, old, reference, scale=0.5))
    draws = own.draws(batch)
    new = torch.stack([own.log_probs(rows.model, batch, draws, j, torch.arange(5)) for j in range(3)], dim=1)
    ratio, advantages, apart = (new - old).exp(), ADVANTAGES[:, None], reference - new
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    terms = (terms - BETA * (apart.exp() - 1 - apart)) * draws.weights / 3
    (-0.5 * (terms.sum(dim=1) / rows.lengths).mean()).backward()
    assert largest_difference(found, rows.take_gradients()) < 1e-6
    values, counts = told(statistics), draws.chosen >= 0
    assert values["diffusion/max_abs_d"] == pytest.approx(float((new - old)[counts].abs().max().detach()), rel=1e-5)
    assert 0 < values["diffusion/clip_fraction"] < 1 and values["diffusion/kl"] > 0
    other, _ = updated(own, rows, MicroStep(batch, ADVANTAGES, reference=reference, scale=0.5))
    assert largest_difference(other, found) > 1e-2  # without the old policy
    unclipped = objective(beta=BETA)
    unclipped.epsilon = 10.0
    other, _ = updated(unclipped, rows, MicroStep(batch, ADVANTAGES, old, reference, scale=0.5))
    assert largest_difference(other, found) > 1e-2


def test_parts_add_up(rows: Batch) -> None:
    own = objective()
    whole, statistics = updated(own, rows, MicroStep(batch_of(rows), ADVANTAGES))
    found = [
        updated(own, rows, MicroStep(batch_of(rows, part), ADVANTAGES[part], scale=(part.stop - part.start) / 5))
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert largest_difference({name: found[0][0][name] + found[1][0][name] for name in whole}, whole) < 1e-6
    assert told(found[0][1] + found[1][1]) == pytest.approx(told(statistics), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("always_run", [False, True])
def test_rows_without_a_step_left_do_not_run(always_run: bool, rows: Batch) -> None:
    """The longest completion that runs has 3 steps; in the other passes a row runs at weight 0 where ranks wait."""
    own, calls = objective(samples=8), []
    log_probs = own.log_probs
    own.log_probs = lambda *args: calls.append(args[-1].tolist()) or log_probs(*args)  # type: ignore[method-assign]
    found, statistics = updated(own, rows, MicroStep(batch_of(rows), ADVANTAGES, always_run=always_run))
    assert [len(which) for which in calls] == [4, 3, 2] + [1] * (5 if always_run else 0)
    fewer, _ = updated(objective(samples=3), rows, MicroStep(batch_of(rows), ADVANTAGES))
    assert largest_difference(found, fewer) < 1e-9  # every step is in three samples already
    assert told(statistics)["diffusion/rows_kept"] == 4


def test_a_rank_without_advantages_adds_nothing(rows: Batch) -> None:
    nothing = torch.zeros(5)
    found, _ = updated(objective(), rows, MicroStep(batch_of(rows), nothing, always_run=True))
    assert found and all((gradient == 0).all() for gradient in found.values())
    found, _ = updated(objective(), rows, MicroStep(batch_of(rows), nothing))
    assert not found


def test_everything_told_is_in_the_table(rows: Batch) -> None:
    reductions: dict[str, Any] = {metric.name: metric.reduction for metric in METRICS}
    own, batch = objective(beta=BETA), batch_of(rows)
    _, found = updated(own, rows, MicroStep(batch, ADVANTAGES, reference=own.stored(rows.model, batch)))
    for reduction, names in (("mean", found.means), ("sum", found.sums), ("max", found.maxima)):
        assert all(reductions[f"{PREFIX}{name}"] == reduction for name in names)
