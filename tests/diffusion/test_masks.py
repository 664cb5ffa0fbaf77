"""Noise is what a seed says: exact counts, uniform marginals, and nothing but the row itself decides."""

from __future__ import annotations

import pytest
import torch

from dta_plugin.diffusion import draw_masks, prompt_noise
from dta_plugin.errors import InvalidInputError

LENGTHS = torch.tensor([7, 1, 12, 3, 0])
SEEDS = torch.arange(5) + 40
WIDTH = 12
ALL = [("k", False), ("k", True), ("t", False), ("t", True)]


def all_masks(draws, width: int = WIDTH) -> torch.Tensor:
    """bool [n, B, width]"""
    return torch.stack([draws.mask(j, width) for j in range(draws.samples)])


@pytest.mark.parametrize(("form", "coupled"), ALL)
def test_prompt_and_padding_are_never_masked(form: str, coupled: bool) -> None:
    masks = all_masks(draw_masks(LENGTHS, 64, SEEDS, form, coupled=coupled))
    inside = torch.arange(WIDTH) < LENGTHS[:, None]
    assert not masks[:, ~inside].any()
    assert masks.any(dim=0)[inside].all()


@pytest.mark.parametrize("stratified", [True, False])
def test_the_k_form_masks_exactly_k_and_weighs_length_over_k(stratified: bool) -> None:
    draws = draw_masks(LENGTHS, 16, SEEDS, stratified=stratified)
    counts = all_masks(draws).sum(dim=2).T
    real = LENGTHS > 0
    assert (counts[real] >= 1).all() and (counts <= LENGTHS[:, None]).all()
    torch.testing.assert_close(draws.weights[real], (LENGTHS[:, None] / counts)[real].float())
    assert (draws.weights[~real] == 0).all()


def test_the_t_form_weighs_one_over_t() -> None:
    draws = draw_masks(torch.tensor([2000]), 8, torch.tensor([3]), "t")
    share = all_masks(draws, 2000).double().mean(dim=2)[:, 0]
    torch.testing.assert_close(draws.weights[0].double(), 1 / torch.from_numpy(draws.levels[0]), rtol=1e-6, atol=0)
    assert (share - torch.from_numpy(draws.levels[0])).abs().max() < 0.05
    assert draws.levels.min() >= 1e-3


def test_stratified_counts_are_evenly_spaced() -> None:
    draws = draw_masks(torch.full((50,), 16), 8, torch.arange(50))
    counts = torch.from_numpy(draws.levels * 16).round().long()
    assert ((counts - counts[:, :1]) % 16 == torch.arange(0, 16, 2)).all()
    free = torch.from_numpy(draw_masks(torch.full((50,), 16), 8, torch.arange(50), stratified=False).levels * 16)
    assert not ((free.round().long() - free.round().long()[:, :1]) % 16 == torch.arange(0, 16, 2)).all()  # control


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("length", "samples"), [(10, 4), (7, 3), (5, 8)])
def test_each_count_is_uniform(length: int, samples: int, stratified: bool) -> None:
    rows = 4000
    draws = draw_masks(torch.full((rows,), length), samples, torch.arange(rows), stratified=stratified)
    counts = torch.from_numpy(draws.levels * length).round().long()
    for column in counts.T:
        seen = torch.bincount(column, minlength=length + 1)[1:].double()
        chi_squared = float(((seen - rows / length) ** 2 / (rows / length)).sum())
        assert torch.special.gammaincc(torch.tensor((length - 1) / 2), torch.tensor(chi_squared / 2)) > 1e-4


def test_each_token_is_masked_equally_often() -> None:
    rows, length = 6000, 6
    draws = draw_masks(torch.full((rows,), length), 1, torch.arange(rows))
    seen = draws.mask(0, length).double().mean(dim=0)
    assert (seen - (length + 1) / (2 * length)).abs().max() < 4 * 0.5 / rows**0.5


def test_masks_of_different_samples_and_seeds_differ() -> None:
    masks = all_masks(draw_masks(torch.full((20,), 64), 4, torch.arange(20)), 64)
    assert len(torch.unique(masks.flatten(0, 1), dim=0)) == 80


@pytest.mark.parametrize(("form", "coupled"), ALL)
def test_a_row_does_not_depend_on_the_batch_around_it(form: str, coupled: bool) -> None:
    draws = draw_masks(LENGTHS, 6, SEEDS, form, coupled=coupled)
    for row in range(len(LENGTHS)):
        alone = draw_masks(LENGTHS[row : row + 1], 6, SEEDS[row : row + 1], form, coupled=coupled)
        assert torch.equal(draws.weights[row], alone.weights[0])
        assert torch.equal(all_masks(draws)[:, row], all_masks(alone)[:, 0])
    some = torch.tensor([3, 0])
    assert torch.equal(draws.mask(5, WIDTH, some), draws.mask(5, WIDTH)[some])
    assert torch.equal(draws.mask(5, WIDTH + 4)[:, :WIDTH], draws.mask(5, WIDTH))


def test_coupled_samples_are_complements_with_an_exact_mean() -> None:
    length = 5
    draws = draw_masks(torch.full((3000,), length), 2, torch.arange(3000), coupled=True)
    first, second = all_masks(draws, length)
    assert torch.equal(first, ~second)
    per_token = torch.stack([first, second]) * draws.weights.T[..., None]
    counts = first.sum(dim=1)
    assert (draws.weights[counts == 0, 0] == 0).all() and (draws.weights[counts == length, 1] == 0).all()
    # E[weight * masked] = 1 for every token in each sample
    error = (per_token.mean(dim=1) - 1).abs() / (per_token.std(dim=1) / 3000**0.5)
    assert error.max() < 4


def test_the_random_state_of_the_process_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw_masks(LENGTHS, 4, SEEDS).mask(0, WIDTH)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_histogram_counts_every_sample_of_real_rows() -> None:
    draws = draw_masks(LENGTHS, 16, SEEDS)
    histogram = draws.histogram(4)
    assert len(histogram) == 4 and sum(histogram) == 4 * 16


def test_prompt_noise_spares_padding_and_follows_the_seed_alone() -> None:
    mask = torch.zeros(2, 4000, dtype=torch.long)
    mask[0, 1000:] = mask[1, :3000] = 1
    noise = prompt_noise(mask, torch.tensor([7, 7]))
    assert not noise[mask == 0].any()
    assert torch.equal(noise[0, 1000:], noise[1, :3000])
    assert abs(float(noise[0, 1000:].double().mean()) - 0.15) < 0.03
    assert not torch.equal(noise, prompt_noise(mask, torch.tensor([7, 7]), sample=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "u"}, "form='u'"),
        ({"samples": 0}, "samples=0"),
        ({"samples": 3, "coupled": True}, "even number"),
        ({"seeds": SEEDS[:2]}, "one integer of each per row"),
        ({"seeds": -SEEDS}, "at least 0"),
        ({"lengths": LENGTHS.float()}, "one integer of each per row"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draw_masks(**({"lengths": LENGTHS, "samples": 2, "seeds": SEEDS} | arguments))


def test_a_canvas_shorter_than_a_completion_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="completion of 12 tokens"):
        draw_masks(LENGTHS, 2, SEEDS).mask(0, 11)
