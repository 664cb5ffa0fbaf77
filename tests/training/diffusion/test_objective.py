"""The update of a micro-batch without any framework: gradients of one graph, and what it tells about itself."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dta_plugin.training.diffusion as room
from dta_plugin.diffusion.objectives.bgpo import bound_terms
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.objective import objective_of
from dta_plugin.training.diffusion.options import OBJECTIVES, DiffusionOptions
from dta_plugin.training.diffusion.statistics import PREFIX, Statistics
from dta_plugin.training.diffusion.update import MicroStep, Objective, back_propagated
from dta_plugin.training.metrics import METRICS
from tests.support.enumerated_elbo import Batch, Gradients, largest_difference, make_batch
from tests.support.tiny_diffusion import FAMILY

CPU = torch.device("cpu")
ALL, SAMPLES, LONGEST = slice(None), 4, 8
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -1.5, 0.75])


@pytest.fixture(scope="module")
def rows() -> Batch:
    return make_batch()


def batch_of(rows: Batch, which: slice = ALL) -> DiffusionBatch:
    seeds = torch.arange(len(rows.lengths)) + 100
    return DiffusionBatch(rows.input_ids[which], rows.attention_mask[which], rows.width, seeds[which])


def elbo(**options: object) -> Objective:
    own = DiffusionOptions(**{"objective": "bgpo", "num_elbo_samples": SAMPLES} | options)  # type: ignore[arg-type]
    return objective_of(own, FAMILY, nullcontext, LONGEST, epsilon=0.2, beta=0.3)


def updated(objective: Objective, rows: Batch, step: MicroStep) -> tuple[Gradients, Statistics]:
    update = objective.update(rows.model, step)
    back_propagated(update.losses(), objective.passes, lambda loss: loss.backward(), nullcontext(), CPU).backward()
    return rows.take_gradients(), update.statistics()


def test_the_bound_in_one_graph(rows: Batch) -> None:
    objective, batch = elbo(), batch_of(rows)
    old = objective.stored(rows.model, batch) + 0.4 * torch.cos(torch.arange(20.0)).view(5, SAMPLES)
    found, told = updated(objective, rows, MicroStep(batch, ADVANTAGES, old, scale=0.5))
    new = rows.terms(rows.draws(SAMPLES))
    d = (new - old) / rows.lengths[:, None]
    bound = sum(bound_terms(d[:, j], ADVANTAGES, SAMPLES).sum() for j in range(SAMPLES))
    (-0.5 / len(batch) * bound).backward()
    assert largest_difference(found, rows.take_gradients()) < 1e-6
    ran = ADVANTAGES != 0
    values = told.over_ranks(lambda own: own[None], CPU)
    assert values["diffusion/elbo"] == pytest.approx(float(new[ran].mean(dim=1).sum() / rows.lengths[ran].sum()))
    assert values["diffusion/max_abs_d"] == pytest.approx(float(d[ran].abs().max()), rel=1e-5)
    other, _ = updated(objective, rows, MicroStep(batch, ADVANTAGES, scale=0.5))
    assert largest_difference(other, found) > 1e-2  # without the old terms


@pytest.mark.parametrize("options", [{}, {"objective": "vrpo"}, {"bound_clip": 0.1}], ids=str)
def test_parts_add_up(options: dict[str, object], rows: Batch) -> None:
    """Gradients of two micro-batches, and what they tell, are those of the whole."""
    objective = elbo(**options)
    whole, told = updated(objective, rows, MicroStep(batch_of(rows), ADVANTAGES))
    parts = [slice(0, 2), slice(2, 5)]
    found = [
        updated(objective, rows, MicroStep(batch_of(rows, part), ADVANTAGES[part], scale=(part.stop - part.start) / 5))
        for part in parts
    ]
    assert largest_difference({name: found[0][0][name] + found[1][0][name] for name in whole}, whole) < 1e-9
    ranks = (found[0][1] + found[1][1]).over_ranks(lambda own: own[None], CPU)
    assert ranks == pytest.approx(told.over_ranks(lambda own: own[None], CPU), rel=1e-6)


def test_ranks_are_put_together(rows: Batch) -> None:
    """Sums add up, means and maxima are those of all, and a mean of nothing is not told."""
    here = Statistics({"elbo": (-6.0, 3), "kl": (0.0, 0)}, {"rows_kept": 2}, {"max_abs_d": 0.5})
    there = torch.tensor([-2.0, 0.0, 1.0, 0.0, 1.0, 0.75])
    found = here.over_ranks(lambda own: torch.stack([own, there]), CPU)
    assert found == {"diffusion/elbo": -2.0, "diffusion/rows_kept": 3.0, "diffusion/max_abs_d": 0.75}


def test_everything_told_is_in_the_table(rows: Batch) -> None:
    reductions = {metric.name: metric.reduction for metric in METRICS if metric.name.startswith(PREFIX)}
    options = DiffusionOptions(objective="diffu-grpo")
    batch, told = batch_of(rows), set()
    blocks = replace(FAMILY, block_length=4)
    for objective in (elbo(bound_clip=0.2), objective_of(options, blocks, nullcontext, LONGEST, epsilon=0.2)):
        step = MicroStep(batch, ADVANTAGES, reference=objective.stored(rows.model, batch))
        _, found = updated(objective, rows, step)
        for reduction, names in (("mean", found.means), ("sum", found.sums), ("max", found.maxima)):
            assert all(reductions[f"{PREFIX}{name}"] == reduction for name in names)
            told |= {f"{PREFIX}{name}" for name in names}
    assert reductions.keys() - told == {"diffusion/peak_memory_gib", "diffusion/model_calls"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_go_by_their_names(name: str) -> None:
    own = objective_of(DiffusionOptions(objective=name), FAMILY, nullcontext, LONGEST, epsilon=0.2)
    assert f'"{name}"' in (type(own).__doc__ or "") and own.options.reads_rollout == (name == "trajectory")


def test_no_framework_is_named() -> None:
    for file in Path(room.__file__).parent.glob("*.py"):
        assert not re.search(r"\b(trl|verl)\b", file.read_text(encoding="utf-8"), re.IGNORECASE), file
