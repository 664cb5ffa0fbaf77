"""ELBO terms: exact where everything can be enumerated, unbiased where it is sampled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dta_plugin.diffusion import draw_masks, predictions, prompt_noise
from dta_plugin.diffusion.objectives.elbo import elbo_term, length_scale, masked_log_probs
from dta_plugin.errors import InvalidInputError
from tests.support.enumerated_elbo import Enumerated, make_batch
from tests.support.tiny_diffusion import FAMILY, MASK, SHIFTED, diffusion_model, padded, shifted_twin

IDS, ATTENTION = padded([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
MASKED = torch.tensor([[True, False, True, True], [False, True, False, False]])


@pytest.fixture(scope="module")
def enumerated() -> Enumerated:
    return Enumerated()


def plain(model, family, ids, attention, mask) -> torch.Tensor:
    """The same from full logits of the noised copy."""
    noised = ids.clone()
    noised[:, -mask.shape[1] :][mask] = MASK
    logits = predictions(model, family, noised, attention, slice(-mask.shape[1], None))
    scores = logits.log_softmax(dim=-1).gather(2, ids[:, -mask.shape[1] :, None])[..., 0]
    return torch.where(mask, scores, 0.0)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_masked_log_probs_are_those_of_full_logits(is_shifted: bool) -> None:
    model, family = diffusion_model(dtype=torch.float64), SHIFTED if is_shifted else FAMILY
    if is_shifted:
        shifted_twin(model)
    got = masked_log_probs(model, family, IDS, ATTENTION, MASKED)
    expected = plain(model, family, IDS, ATTENTION, MASKED)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert (got[~MASKED] == 0).all()
    other = SHIFTED if family is FAMILY else FAMILY
    assert not torch.allclose(got, masked_log_probs(model, other, IDS, ATTENTION, MASKED))  # control
    got.sum().backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-8, atol=1e-9)


def test_a_model_without_a_decoder_of_its_own_gives_the_same() -> None:
    model = diffusion_model(dtype=torch.float64)
    expected = masked_log_probs(model, FAMILY, IDS, ATTENTION, MASKED)
    other = copy.deepcopy(model)
    other.base_model_prefix = "transformer"  # not there: like remote code that is one module
    torch.testing.assert_close(masked_log_probs(other, FAMILY, IDS, ATTENTION, MASKED), expected)


def test_a_lora_model_gives_gradients_to_its_adapter_alone() -> None:
    model = get_peft_model(
        diffusion_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    got = masked_log_probs(model, FAMILY, IDS, ATTENTION, MASKED)
    torch.testing.assert_close(got, plain(model, FAMILY, IDS, ATTENTION, MASKED), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in model.named_parameters())


def test_bfloat16_scores_are_float32() -> None:
    assert masked_log_probs(diffusion_model(dtype=torch.bfloat16), FAMILY, IDS, None, MASKED).dtype == torch.float32


def test_nothing_masked_gives_zeros_with_a_graph() -> None:
    model = diffusion_model()
    got = masked_log_probs(model, FAMILY, IDS, ATTENTION, torch.zeros_like(MASKED))
    assert (got == 0).all()
    got.sum().backward()
    assert all((p.grad is None) or (p.grad == 0).all() for p in model.parameters())


def test_noise_in_the_prompt_changes_the_scores_of_the_completion() -> None:
    model = diffusion_model()
    noise = prompt_noise(ATTENTION[:, :2], torch.tensor([1, 2]), probability=1.0)
    got = masked_log_probs(model, FAMILY, IDS, ATTENTION, MASKED, prompt_mask=noise)
    blind = IDS.clone()
    blind[:, :2][noise] = MASK
    torch.testing.assert_close(got, masked_log_probs(model, FAMILY, blind, ATTENTION, MASKED))
    assert not torch.allclose(got, masked_log_probs(model, FAMILY, IDS, ATTENTION, MASKED))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"Expected \[B, C\]"):
        masked_log_probs(diffusion_model(), FAMILY, IDS, None, MASKED[:1])


def test_both_forms_are_the_mean_any_order_log_likelihood(enumerated: Enumerated) -> None:
    length, counts, sums = enumerated.length, enumerated.counts, enumerated.sums
    subsets = torch.tensor([math.comb(length, k) for k in range(length + 1)], dtype=torch.float64)
    is_noised = counts > 0
    k_form = (sums / (counts.clamp(min=1) * subsets[counts]))[is_noised].sum()  # 1/L * L/k * 1/C(L, k)
    # the integral over t of t^(k - 1) (1 - t)^(L - k)
    beta = [math.gamma(k) * math.gamma(length - k + 1) / math.gamma(length + 1) for k in range(1, length + 1)]
    t_form = (torch.tensor([0.0, *beta], dtype=torch.float64)[counts] * sums).sum()
    any_order = enumerated.order_log_likelihoods().mean()
    torch.testing.assert_close(k_form, any_order, rtol=1e-10, atol=0)
    torch.testing.assert_close(t_form, any_order, rtol=1e-10, atol=0)


def test_the_elbo_is_below_the_mixture_over_orders(enumerated: Enumerated) -> None:
    orders = enumerated.order_log_likelihoods()
    assert orders.mean() < orders.logsumexp(dim=0) - math.log(len(orders)) - 1e-3


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("form", "coupled"), [("k", False), ("k", True), ("t", False), ("t", True)])
def test_sampled_terms_are_unbiased(enumerated: Enumerated, form: str, coupled: bool, stratified: bool) -> None:
    rows, samples, length = 5000, 4, enumerated.length
    draws = draw_masks(torch.full((rows,), length), samples, torch.arange(rows), form, stratified, coupled)
    terms = torch.empty(rows, samples, dtype=torch.float64)
    unweighted = torch.empty_like(terms)
    for j in range(samples):
        mask = draws.mask(j, length)
        scores = enumerated.scores[enumerated.index(mask)]
        terms[:, j] = elbo_term(scores, mask, draws.weights[:, j])
        unweighted[:, j] = elbo_term(scores, mask, torch.ones(rows))  # control
    truth = enumerated.order_log_likelihoods().mean()
    assert abs(z_score(terms, truth)) < 4
    assert abs(z_score(unweighted, truth)) > 4


def z_score(terms: torch.Tensor, truth: torch.Tensor) -> float:
    per_row = terms.mean(dim=1)
    return float((per_row.mean() - truth) / (per_row.std() / len(per_row) ** 0.5))


def test_sample_terms_weigh_the_masked_log_probs_of_their_rows() -> None:
    batch = make_batch()
    draws = batch.draws(3)
    with torch.no_grad():
        every = batch.terms(draws)
        mask = draws.mask(1, batch.width)
        scores = masked_log_probs(batch.model, FAMILY, batch.input_ids, batch.attention_mask, mask)
        torch.testing.assert_close(every[:, 1], scores.sum(dim=1) * draws.weights[:, 1].double())
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(batch.term(draws, 2, rows), every[rows, 2])
        assert not torch.allclose(batch.terms(batch.draws(3, first_seed=7)), every)  # resampled masks


def test_a_noisy_log_prob_outside_the_mask_does_not_count() -> None:
    scores = torch.tensor([[-1.0, float("nan"), -2.0]])
    got = elbo_term(scores, torch.tensor([[True, False, True]]), torch.tensor([1.5]))
    assert got.tolist() == [-4.5]


def test_length_scales() -> None:
    lengths = torch.tensor([4, 8, 0])
    assert length_scale("none", lengths, 16).tolist() == [1.0, 1.0, 1.0]
    assert length_scale("length", lengths, 16).tolist() == [0.25, 0.125, 1.0]
    assert length_scale("max_length", lengths, 16).tolist() == [0.0625] * 3
    with pytest.raises(InvalidInputError, match="length_norm='mean'"):
        length_scale("mean", lengths, 16)
