"""GDSD's squared distance: its gradient sample by sample, where it has BGPO's direction, and its optimum."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch

from dta_plugin.diffusion import MaskDraws
from dta_plugin.diffusion.objectives.bgpo import per_sample_losses
from dta_plugin.diffusion.objectives.gdsd import clamp_range, clamped, distance_terms
from dta_plugin.errors import InvalidInputError
from tests.support.enumerated_elbo import Batch, Enumerated, Gradients, largest_difference, make_batch
from tests.support.saved import SavedBytes

SAMPLES, EPSILON, PSI = 6, 0.2, 0.7
LOW, HIGH = math.log(0.8), math.log(1.2)


def unweighted(batch: Batch, samples: int = SAMPLES) -> MaskDraws:
    draws = batch.draws(samples)
    return replace(draws, weights=torch.ones_like(draws.weights))


def loop_gradients(batch: Batch, draws: MaskDraws, old: torch.Tensor | None, epsilon: float = EPSILON) -> Gradients:
    rows = torch.arange(len(batch.lengths))
    for sample in range(draws.samples):
        new = batch.term(draws, sample, rows)
        d = new - (new.detach() if old is None else old[:, sample])
        distance_terms(d, batch.advantages, draws.samples, batch.width, PSI, epsilon).mean().backward()
    return batch.take_gradients()


def bound_gradients(batch: Batch, draws: MaskDraws, old: torch.Tensor | None) -> Gradients:
    """Of BGPO's bound on the same terms, which are divided by the width of the canvas, times 2 psi."""
    scale = torch.full((len(batch.lengths),), 1.0 / batch.width)
    term = lambda sample, rows: batch.term(draws, sample, rows)  # noqa: E731
    parts = per_sample_losses(term, batch.advantages, SAMPLES, old_terms=old, length_scale=scale, loss_scale=2 * PSI)
    for part in parts:
        part.loss.backward()
    return batch.take_gradients()


def test_off_policy_the_loop_is_the_gradient_of_one_graph() -> None:
    batch = make_batch()
    draws = unweighted(batch)
    with torch.no_grad():
        old = batch.terms(draws)
    batch.move()
    loop = loop_gradients(batch, draws, old)
    d = batch.terms(draws) - old
    assert 0.1 < clamped(d, EPSILON).double().mean() < 0.9
    bounded = torch.minimum(torch.maximum(d, torch.tensor(LOW)), torch.tensor(HIGH))
    target = PSI * batch.advantages[:, None]
    ((bounded / batch.width - target) ** 2).mean().backward()
    assert largest_difference(loop, batch.take_gradients()) < 1e-6
    assert largest_difference(loop, loop_gradients(batch, draws, old, epsilon=0.9)) > 1e-2  # control: the clamp
    other = replace(draws, seeds=draws.seeds + 1)
    assert largest_difference(loop, loop_gradients(batch, other, old)) > 1e-2  # control: the masks


def test_on_policy_its_direction_is_that_of_the_bound() -> None:
    batch = make_batch()
    draws = unweighted(batch)
    found = loop_gradients(batch, draws, None)
    assert largest_difference(found, bound_gradients(batch, draws, None)) < 1e-6


def test_off_policy_and_with_the_weights_of_an_elbo_it_is_not() -> None:
    """Negative controls of the above."""
    batch = make_batch()
    draws = unweighted(batch)
    with torch.no_grad():
        old = batch.terms(draws)
    on_policy = loop_gradients(batch, draws, None)
    assert largest_difference(on_policy, bound_gradients(batch, batch.draws(SAMPLES), None)) > 1e-2
    batch.move(0.002)
    assert not clamped(batch.terms(draws) - old, EPSILON).all()
    assert largest_difference(loop_gradients(batch, draws, old), bound_gradients(batch, draws, old)) > 1e-2


def test_a_sample_is_drawn_to_its_target_until_the_clamp_holds_it() -> None:
    """psi A W nats: from both sides within the clamp; beyond it, on either side, nothing moves."""
    d = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64, requires_grad=True)
    for advantage in (1.0, -1.0, 0.0):
        value = distance_terms(d, torch.full((101,), advantage, dtype=torch.float64), 1, 8, 0.01, EPSILON)
        (gradient,) = torch.autograd.grad(value.sum(), d)
        inside = ~clamped(d, EPSILON)
        assert torch.equal(inside, (d >= LOW) & (d <= HIGH)) and 20 < inside.sum() < 80
        assert (gradient[~inside] == 0).all()
        expected = 2 * (d.detach() / 8 - 0.01 * advantage) / 8
        torch.testing.assert_close(gradient[inside], expected[inside])
        best = d.detach()[value.argmin()]
        assert float(best) == pytest.approx(0.08 * advantage, abs=0.006)


def test_the_mean_over_drawn_masks_is_that_of_all_maskings() -> None:
    """By enumeration of all 2^5 maskings of a completion whose log-probs have all moved by a little."""
    tiny = Enumerated(5)
    d = -0.015 * tiny.sums
    value = distance_terms(d, torch.ones_like(d), 1, 5, 0.01, EPSILON)
    assert 0 < clamped(d, EPSILON).sum() < 16
    sizes = torch.tensor([math.comb(5, int(k)) for k in tiny.counts], dtype=torch.float64)
    chance = torch.where(tiny.counts > 0, 1.0 / (5 * sizes), 0.0)  # of a number of tokens, then of which
    draws = make_batch(lengths=(5,)).draws(4000, stratified=False)
    found = torch.stack([value[tiny.index(draws.mask(j, 5)[0])] for j in range(4000)])
    spread = float(found.std()) / 4000**0.5
    assert abs(float(found.mean() - (chance * value).sum())) < 3 * spread
    assert abs(float(found.mean() - value.mean())) > 6 * spread  # control: maskings are not equally likely


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.2, float("nan")])
def test_clamps_that_cannot_be(epsilon: float) -> None:
    with pytest.raises(InvalidInputError, match=r"epsilon=.*Expected a value between 0 and 1"):
        clamp_range(epsilon)


def peak_bytes(batch: Batch, samples: int, is_loop: bool) -> int:
    saved, draws = SavedBytes(batch.model), unweighted(batch, samples)
    old = torch.zeros(len(batch.lengths), samples)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        if is_loop:
            loop_gradients(batch, draws, old)
        else:
            (batch.terms(draws).clamp(LOW, HIGH) / batch.width).square().sum().backward()
    batch.take_gradients()
    gc.collect()
    return saved.peak


def test_the_loop_needs_the_memory_of_one_sample_and_one_graph_that_of_all() -> None:
    batch = make_batch(torch.float32, lengths=(40, 38, 40, 36))
    loop = {n: peak_bytes(batch, n, True) for n in (1, 4, 32)}
    graph = {n: peak_bytes(batch, n, False) for n in (1, 4)}
    assert all(abs(loop[n] / loop[1] - 1) < 0.05 for n in loop)
    assert abs(graph[4] / (4 * loop[1]) - 1) < 0.05
