"""GDSD's update without any framework: rows that are held, parts that add up, and all it tells is known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.gdsd import GdsdObjective
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import PREFIX, Statistics
from dta_plugin.training.diffusion.update import MicroStep, back_propagated
from dta_plugin.training.metrics import METRICS
from tests.support.enumerated_elbo import Batch, Gradients, largest_difference, make_batch
from tests.support.tiny_diffusion import FAMILY

CPU = torch.device("cpu")
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -1.5, 0.75])
ALL, SAMPLES, WIDTH, PSI, EPSILON, BETA = slice(None), 4, 10, 0.02, 0.3, 0.6


@pytest.fixture(scope="module")
def rows() -> Batch:
    return make_batch()


def batch_of(rows: Batch, which: slice = ALL) -> DiffusionBatch:
    seeds = torch.arange(100, 105)[which]
    return DiffusionBatch(rows.input_ids[which], rows.attention_mask[which], rows.width, seeds)


def objective(beta: float = 0.0, **options: Any) -> GdsdObjective:
    own = DiffusionOptions(objective="gdsd", num_elbo_samples=SAMPLES, advantage_scale=PSI, **options)
    return GdsdObjective(own, FAMILY, nullcontext, WIDTH, EPSILON, beta)


def updated(own: GdsdObjective, rows: Batch, step: MicroStep) -> tuple[Gradients, Statistics]:
    update = own.update(rows.model, step)
    back_propagated(update.losses(), own.passes, lambda loss: loss.backward(), nullcontext(), CPU).backward()
    return rows.take_gradients(), update.statistics()


def told(statistics: Statistics) -> dict[str, float]:
    return statistics.over_ranks(lambda own: own[None], CPU)


def moved(stored: torch.Tensor, size: float) -> torch.Tensor:
    return stored + size * torch.cos(1.3 * torch.arange(stored.numel())).view_as(stored)


def test_the_distance_in_one_graph(rows: Batch) -> None:
    """Of every row, the one without advantage too, which is held at the old policy."""
    own, batch = objective(beta=BETA), batch_of(rows)
    stored = own.stored(rows.model, batch)
    old, reference = moved(stored, 0.5), moved(stored, 2.0)
    found, statistics = updated(own, rows, MicroStep(batch, ADVANTAGES, old, reference, scale=0.5))
    draws = rows.draws(SAMPLES)
    new = rows.terms(draws) / draws.weights  # what an ELBO weighs by the inverse of the masked share
    d, apart = new - old, (new - reference) / WIDTH
    bounded = torch.minimum(torch.maximum(d, torch.tensor(math.log(0.7))), torch.tensor(math.log(1.3)))
    ((bounded / WIDTH - PSI * ADVANTAGES[:, None]) ** 2 + BETA * apart**2 / 2).mean().mul(0.5).backward()
    assert largest_difference(found, rows.take_gradients()) < 1e-6
    values = told(statistics)
    assert values["diffusion/rows_kept"] == 5 and 0.1 < values["diffusion/clip_fraction"] < 0.9
    assert values["diffusion/max_abs_d"] == pytest.approx(float(d.detach().abs().max()) / WIDTH, rel=1e-5)
    assert values["diffusion/kl"] == pytest.approx(float((apart.detach() ** 2 / 2).mean()), rel=1e-5)
    elbo = rows.terms(draws).detach().mean(dim=1).sum() / rows.lengths.sum()
    assert values["diffusion/elbo"] == pytest.approx(float(elbo), rel=1e-5)
    other, _ = updated(own, rows, MicroStep(batch, ADVANTAGES, None, reference, scale=0.5))
    assert largest_difference(other, found) > 1e-2  # without the old policy


@pytest.mark.parametrize("off_policy", [False, True])
def test_parts_add_up(off_policy: bool, rows: Batch) -> None:
    own, batch = objective(), batch_of(rows)
    old = moved(own.stored(rows.model, batch), 0.5) if off_policy else None
    whole, statistics = updated(own, rows, MicroStep(batch, ADVANTAGES, old))
    found = []
    for part in (slice(0, 2), slice(2, 5)):
        share = None if old is None else old[part]
        step = MicroStep(batch_of(rows, part), ADVANTAGES[part], share, scale=(part.stop - part.start) / 5)
        found.append(updated(own, rows, step))
    assert largest_difference({name: found[0][0][name] + found[1][0][name] for name in whole}, whole) < 1e-6
    assert told(found[0][1] + found[1][1]) == pytest.approx(told(statistics), rel=1e-5, abs=1e-9)


def test_on_policy_only_rows_with_an_advantage_run(rows: Batch) -> None:
    """And with old terms that are the policy's own the gradient is the same, though all of them do."""
    own, batch, calls = objective(), batch_of(rows), []
    old, term = own.stored(rows.model, batch), own.term
    own.term = lambda *args: calls.append(args[-1].tolist()) or term(*args)  # type: ignore[method-assign]
    found, statistics = updated(own, rows, MicroStep(batch, ADVANTAGES))
    assert calls == [[0, 1, 3, 4]] * SAMPLES and told(statistics)["diffusion/rows_skipped"] == 1
    every, _ = updated(own, rows, MicroStep(batch, ADVANTAGES, old))
    assert calls[SAMPLES:] == [[0, 1, 2, 3, 4]] * SAMPLES
    assert largest_difference(found, every) < 1e-6


@pytest.mark.parametrize("always_run", [False, True])
def test_a_rank_without_advantages(always_run: bool, rows: Batch) -> None:
    """On-policy it adds nothing; off-policy its rows are drawn back, but for completions that are masked out."""
    own, batch, nothing = objective(), batch_of(rows), torch.zeros(5)
    found, statistics = updated(own, rows, MicroStep(batch, nothing, always_run=always_run))
    assert bool(found) == always_run and all((gradient == 0).all() for gradient in found.values())
    assert told(statistics)["diffusion/rows_kept"] == 0
    old = moved(own.stored(rows.model, batch), 0.1)
    held, _ = updated(own, rows, MicroStep(batch, nothing, old, always_run=always_run))
    assert max(float(gradient.abs().max()) for gradient in held.values()) > 1e-5
    mask = batch.attention_mask.clone()
    mask[:, -batch.width :] = 0
    empty = DiffusionBatch(batch.input_ids, mask, batch.width, batch.seeds)
    found, _ = updated(own, rows, MicroStep(empty, ADVANTAGES, old, always_run=always_run))
    assert all((gradient == 0).all() for gradient in found.values())


def test_terms_of_another_number_of_samples_are_refused(rows: Batch) -> None:
    with pytest.raises(InvalidInputError, match=r"old_terms of shape .* Expected \(5, 4\)"):
        objective().update(rows.model, MicroStep(batch_of(rows), ADVANTAGES, torch.zeros(5, 2)))


def test_everything_told_is_in_the_table(rows: Batch) -> None:
    reductions: dict[str, Any] = {metric.name: metric.reduction for metric in METRICS}
    own, batch = objective(beta=BETA), batch_of(rows)
    _, found = updated(own, rows, MicroStep(batch, ADVANTAGES, reference=own.stored(rows.model, batch)))
    for reduction, names in (("mean", found.means), ("sum", found.sums), ("max", found.maxima)):
        assert all(reductions[f"{PREFIX}{name}"] == reduction for name in names)
