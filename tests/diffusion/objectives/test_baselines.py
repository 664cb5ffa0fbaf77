"""The objectives that BGPO is compared with."""

from __future__ import annotations

import math

import torch

from dta_plugin.diffusion import prompt_noise
from dta_plugin.diffusion.objectives.baselines import k3_terms, sampled_elbo_ratio, token_ratio_terms
from dta_plugin.diffusion.objectives.elbo import masked_log_probs
from tests.support.enumerated_elbo import make_batch
from tests.support.tiny_diffusion import FAMILY

SCORED = torch.tensor([[True, True, False], [True, True, True]])
ADVANTAGES = torch.tensor([2.0, -1.0])


def test_token_ratios_are_clipped_and_averaged_over_the_completion() -> None:
    ratio = torch.tensor([[2.0, 0.9, 50.0], [2.0, 0.3, 1.1]])
    got = token_ratio_terms(ratio.log(), torch.zeros(2, 3), ADVANTAGES, SCORED, epsilon=0.5)
    torch.testing.assert_close(got, torch.tensor([2 * (1.5 + 0.9) / 2, -(2.0 + 0.5 + 1.1) / 3]))


def test_clipped_tokens_have_no_gradient_and_others_that_of_the_ratio() -> None:
    log_probs = torch.tensor([[2.0, 0.9, 1.0], [2.0, 0.3, 1.1]]).log().requires_grad_()
    token_ratio_terms(log_probs, torch.zeros(2, 3), ADVANTAGES, SCORED, epsilon=0.5).sum().backward()
    expected = torch.tensor([[0.0, 2 * 0.9 / 2, 0.0], [-2.0 / 3, 0.0, -1.1 / 3]])
    torch.testing.assert_close(log_probs.grad, expected)


def test_a_completion_without_scored_tokens_counts_nothing() -> None:
    got = token_ratio_terms(torch.zeros(2, 3), torch.zeros(2, 3), ADVANTAGES, torch.zeros_like(SCORED))
    assert got.tolist() == [0.0, 0.0]


def test_one_step_ratios_are_one_with_the_same_noise_only() -> None:
    batch = make_batch()
    width = batch.width
    scored = batch.attention_mask[:, -width:].bool()
    prompts = batch.attention_mask[:, :-width]

    def one_step(first_seed: int) -> torch.Tensor:
        noise = prompt_noise(prompts, torch.arange(5) + first_seed, probability=0.5)
        return masked_log_probs(batch.model, FAMILY, batch.input_ids, batch.attention_mask, scored, prompt_mask=noise)

    new = one_step(0)
    same = token_ratio_terms(new, one_step(0).detach(), batch.advantages, scored)
    torch.testing.assert_close(same, batch.advantages.double())
    other = token_ratio_terms(new, one_step(50).detach(), batch.advantages, scored)
    assert not torch.allclose(other, batch.advantages.double(), atol=1e-3)


def test_the_sampled_ratio_is_the_exponential_of_the_mean_and_stays_finite() -> None:
    d = torch.tensor([[0.5, -0.1], [900.0, 1100.0]], requires_grad=True)
    got = sampled_elbo_ratio(d, ADVANTAGES)
    torch.testing.assert_close(got[0], 2 * torch.tensor(0.2).exp())
    got.sum().backward()
    assert torch.isfinite(got).all() and torch.isfinite(d.grad).all()


def test_k3_is_zero_at_the_reference_and_never_below_on_scored_tokens_only() -> None:
    reference = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    assert k3_terms(reference, reference, SCORED).tolist() == [0.0, 0.0]
    apart = torch.tensor([[0.5, -0.5, 9.0], [0.1, 0.0, -2.0]])
    rows = [[0.5, -0.5], [0.1, 0.0, -2.0]]
    expected = [sum(math.exp(r) - 1 - r for r in row) / len(row) for row in rows]
    torch.testing.assert_close(k3_terms(reference, reference + apart, SCORED), torch.tensor(expected))
