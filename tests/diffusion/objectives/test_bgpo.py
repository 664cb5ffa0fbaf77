"""BGPO's bound: below the objective, equal to it on-policy, and its gradient sample by sample in constant memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from dta_plugin.diffusion.objectives.baselines import sampled_elbo_ratio
from dta_plugin.diffusion.objectives.bgpo import (
    MAX_EXPONENT,
    bound_gap,
    bound_terms,
    clipped,
    per_sample_losses,
    tangent_exp,
)
from dta_plugin.diffusion.objectives.elbo import length_scale
from dta_plugin.errors import InvalidInputError
from tests.support.enumerated_elbo import Batch, Gradients, largest_difference, make_batch
from tests.support.saved import SavedBytes

SAMPLES = 6


def random_differences(scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    d = scale * torch.randn(200, 16, dtype=torch.float64, generator=generator)
    return d, torch.randn(200, dtype=torch.float64, generator=generator)


def bound(d: torch.Tensor, advantages: torch.Tensor, **options: float) -> torch.Tensor:
    terms = [bound_terms(column, advantages, d.shape[1], **options) for column in d.T]
    return torch.stack(terms).sum(dim=0)


def test_the_bound_is_below_the_objective_for_both_signs() -> None:
    d, advantages = random_differences()
    slack = sampled_elbo_ratio(d, advantages) - bound(d, advantages)
    assert slack.min() >= -1e-12
    torch.testing.assert_close(bound_gap(d, advantages), slack, rtol=1e-9, atol=1e-12)


def test_neither_branch_serves_the_other_sign() -> None:
    d, advantages = random_differences()
    wrong = bound(d, -advantages)
    assert (sampled_elbo_ratio(d, advantages) + wrong < -1e-6).any()


def test_ppo_clipping_loosens_the_bound_and_dual_clipping_gives_it_up() -> None:
    d, advantages = random_differences()
    objective = sampled_elbo_ratio(d, advantages)
    assert (bound(d, advantages, clip=0.2) <= bound(d, advantages)).all()
    assert (bound(d, advantages, dual_clip=1.5) > objective).any()
    assert (bound(d, advantages, dual_clip=1.5)[advantages < 0] >= 1.5 * advantages[advantages < 0]).all()


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"dual_clip": 1.0}])
def test_clip_ranges_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="Expected None or a value above"):
        bound_terms(torch.zeros(2), torch.ones(2), 1, **options)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("d", [-100.0, -2.0, -1.0, 0.0, 15.0, 30.0, 5000.0])
def test_values_and_gradients_are_finite_and_never_vanish(d: float, advantage: float) -> None:
    x = torch.tensor([d], requires_grad=True)
    g = bound_terms(x, torch.tensor([advantage]), 4)
    g.sum().backward()
    assert torch.isfinite(g).all() and torch.isfinite(x.grad).all()
    assert x.grad * advantage > 0
    if advantage > 0:
        assert g == (1 + x) / 4


def test_the_exponential_goes_on_as_its_tangent() -> None:
    x = torch.tensor([3.0, MAX_EXPONENT, MAX_EXPONENT + 2.0], dtype=torch.float64, requires_grad=True)
    y = tangent_exp(x)
    top = torch.tensor(MAX_EXPONENT, dtype=torch.float64).exp()
    torch.testing.assert_close(y[:2], x[:2].exp())
    torch.testing.assert_close(y[2], 3 * top)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.stack([x[0].exp().detach(), top, top]))


# The loop


def loop_gradients(batch: Batch, **options) -> tuple[Gradients, float]:
    draws = batch.draws(SAMPLES)
    total = 0.0
    for part in per_sample_losses(lambda j, rows: batch.term(draws, j, rows), batch.advantages, SAMPLES, **options):
        part.loss.backward()
        total += part.loss.item()
    return batch.take_gradients(), total


def graph_gradients(
    batch: Batch,
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    old: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
) -> tuple[Gradients, float]:
    """One graph over all samples."""
    new = batch.terms(batch.draws(SAMPLES))
    d = (new - (new.detach() if old is None else old)) * scale
    loss = -objective(d, batch.advantages.double()).mean()
    loss.backward()
    return batch.take_gradients(), loss.item()


def test_on_policy_the_loop_has_value_and_gradient_of_the_objective() -> None:
    batch = make_batch()
    loop, value = loop_gradients(batch)
    graph, expected = graph_gradients(batch, sampled_elbo_ratio)
    assert abs(value - expected) < 1e-6
    assert largest_difference(graph, loop) < 1e-6


@pytest.mark.parametrize("norm", ["none", "length", "max_length"])
def test_off_policy_the_loop_is_the_gradient_of_the_bound(norm: str) -> None:
    batch = make_batch()
    with torch.no_grad():
        old = batch.terms(batch.draws(SAMPLES))
    batch.move()
    scale = length_scale(norm, batch.lengths, batch.width)
    loop, value = loop_gradients(batch, old_terms=old, length_scale=scale)
    graph, expected = graph_gradients(batch, bound, old, scale[:, None].double())
    assert abs(value - expected) < 1e-6 * max(1.0, abs(expected))
    assert largest_difference(graph, loop) < 1e-6
    elsewhere, _ = graph_gradients(batch, sampled_elbo_ratio, old, scale[:, None].double())
    assert largest_difference(graph, elsewhere) > 1e-3  # control: off-policy only the bound holds


def test_resampled_masks_would_not_be_on_policy() -> None:
    batch = make_batch()
    with torch.no_grad():
        same, other = (batch.terms(batch.draws(SAMPLES, first_seed=seed)) for seed in (100, 7))
    draws = batch.draws(SAMPLES)

    def differences(old: torch.Tensor) -> torch.Tensor:
        term = lambda j, rows: batch.term(draws, j, rows)  # noqa: E731
        return torch.stack([p.d for p in per_sample_losses(term, batch.advantages, SAMPLES, old_terms=old)])

    assert differences(same).abs().max() < 1e-10
    assert differences(other).abs().max() > 1e-2


def test_rows_without_advantage_do_not_run_and_the_means_stay() -> None:
    batch = make_batch()
    batch.advantages[[1, 3]] = 0.0
    seen: list[list[int]] = []
    draws = batch.draws(SAMPLES)

    def term(j: int, rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.tolist())
        return batch.term(draws, j, rows)

    for part in per_sample_losses(term, batch.advantages, SAMPLES):
        part.loss.backward()
        assert part.d.shape == (5,)
    assert seen == [[0, 2, 4]] * SAMPLES
    loop = batch.take_gradients()
    graph, _ = graph_gradients(batch, sampled_elbo_ratio)
    assert largest_difference(graph, loop) < 1e-6


def test_without_advantages_nothing_runs_unless_ranks_must_agree() -> None:
    batch = make_batch()
    batch.advantages.zero_()
    draws = batch.draws(2)
    term = lambda j, rows: batch.term(draws, j, rows)  # noqa: E731
    assert list(per_sample_losses(term, batch.advantages, 2)) == []
    parts = 0
    for part in per_sample_losses(term, batch.advantages, 2, always_run=True):
        part.loss.backward()
        parts += 1
    assert parts == 2
    assert all((g == 0).all() for g in batch.take_gradients().values())


def test_the_loss_is_scaled_as_asked() -> None:
    batch = make_batch()
    once, value = loop_gradients(batch)
    half, halved = loop_gradients(batch, loss_scale=0.5)
    assert abs(halved - value / 2) < 1e-12
    assert largest_difference({n: g / 2 for n, g in once.items()}, half) < 1e-12


@pytest.mark.parametrize("name", ["old_terms", "reference_terms"])
def test_terms_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"{name} of shape .* Expected \(5, 2\)"):
        next(per_sample_losses(lambda j, rows: rows, torch.ones(5), 2, **{name: torch.zeros(5)}))


# Memory


def peak_bytes(batch: Batch, samples: int, is_loop: bool) -> int:
    saved = SavedBytes(batch.model)
    draws = batch.draws(samples)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        if is_loop:
            for part in per_sample_losses(lambda j, rows: batch.term(draws, j, rows), batch.advantages, samples):
                part.loss.backward()
        else:
            new = batch.terms(draws)
            (-sampled_elbo_ratio(new - new.detach(), batch.advantages).mean()).backward()
    batch.take_gradients()
    gc.collect()
    return saved.peak


def test_the_loop_needs_the_memory_of_one_sample_and_one_graph_that_of_all() -> None:
    batch = make_batch(torch.float32, lengths=(40, 38, 40, 36))
    loop = {n: peak_bytes(batch, n, True) for n in (1, 4, 32)}
    graph = {n: peak_bytes(batch, n, False) for n in (1, 4, 32)}
    for n in loop:
        assert abs(loop[n] / loop[1] - 1) < 0.05
        assert abs(graph[n] / (n * graph[1]) - 1) < 0.05


# Reference and clip statistics


def test_the_penalty_is_the_mean_of_the_samples_own_and_every_row_runs() -> None:
    batch = make_batch()
    batch.advantages[1] = 0.0
    draws, scale = batch.draws(SAMPLES), length_scale("length", batch.lengths, batch.width)
    reference = batch.terms(draws).detach()
    batch.move()
    parts = per_sample_losses(
        lambda j, rows: batch.term(draws, j, rows),
        batch.advantages,
        SAMPLES,
        length_scale=scale,
        reference_terms=reference,
        beta=0.3,
    )
    for part in parts:
        part.loss.backward()
    loop = batch.take_gradients()
    new = batch.terms(draws)
    bound = (new - new.detach()) * scale[:, None] * batch.advantages[:, None]
    penalty = 0.3 * ((new - reference) * scale[:, None]).square() / 2
    (-(bound - penalty).mean()).backward()
    graph = batch.take_gradients()
    assert largest_difference(loop, graph) < 1e-9
    (-(batch.terms(draws) * scale[:, None] * batch.advantages[:, None]).mean()).backward()
    assert largest_difference(loop, batch.take_gradients()) > 1e-2


def test_clipped_says_where_the_gradient_is_gone() -> None:
    d = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64, requires_grad=True)
    for advantage in (1.0, -1.0):
        advantages = torch.full_like(d, advantage).detach()
        for clips in ({"clip": 0.22}, {"dual_clip": 3.1}, {"clip": 0.22, "dual_clip": 3.1}):
            (gradient,) = torch.autograd.grad(bound_terms(d, advantages, 1, **clips).sum(), d)
            assert torch.equal(clipped(d, advantages, **clips), gradient == 0)
