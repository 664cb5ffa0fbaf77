"""Steps are drawn without replacement, each as likely as another, from a row's own seed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dta_plugin.diffusion.steps import draw_steps
from dta_plugin.errors import InvalidInputError

# Two blocks of two steps; the second row ends within the first block, behind what its first step committed; the third
# has nothing that counts.
STEPS = torch.tensor([[1, 0, 0, 3, 2, 4], [2, 1, 1, 0, -1, -1], [0, 1, 2, 3, -1, -1]])
LENGTHS = torch.tensor([6, 3, 0])
SEEDS = torch.tensor([5, 6, 7])
ALL = torch.arange(3)


def test_every_step_that_counts_once() -> None:
    draws = draw_steps(STEPS, LENGTHS, 6, SEEDS)
    assert [sorted(row) for row in draws.chosen.tolist()] == [[-1, 0, 1, 2, 3, 4], [-1] * 4 + [1, 2], [-1] * 6]
    assert draws.weights.tolist() == [[6.0] * 5 + [0.0], [6.0] * 2 + [0.0] * 4, [0.0] * 6]
    masks = torch.stack([draws.mask(sample, ALL) for sample in range(draws.samples)])
    assert torch.equal(masks.sum(dim=0), (torch.arange(6) < LENGTHS[:, None]).long())


def test_fewer_samples_than_steps_weigh_more() -> None:
    draws = draw_steps(STEPS, LENGTHS, 1, SEEDS)
    assert draws.weights.tolist() == [[5.0], [2.0], [0.0]]
    assert set(draws.chosen[:2, 0].tolist()) <= {0, 1, 2, 3, 4}


def test_what_a_step_saw_and_committed() -> None:
    draws = draw_steps(STEPS, LENGTHS, 6, SEEDS)
    sample = draws.chosen[1].tolist().index(1)
    row = torch.tensor([1])
    assert draws.mask(sample, row).tolist() == [[False, True, True, False, False, False]]
    assert draws.waiting(sample, row).tolist() == [[True, True, True, False, True, True]]  # committed behind the end


@pytest.mark.parametrize("samples", [1, 2])
def test_every_ordered_draw_is_as_likely_as_another(samples: int) -> None:
    rows, steps = 6000, torch.tensor([[0, 2, 1, 3]])
    chosen = draw_steps(steps.repeat(rows, 1), torch.full((rows,), 4), samples, torch.arange(rows)).chosen
    outcomes = list(itertools.permutations(range(4), samples))
    expected = rows / len(outcomes)
    for outcome in outcomes:
        found = int((chosen == torch.tensor(outcome)).all(dim=1).sum())
        assert abs(found - expected) < 4 * expected**0.5


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together, alone = draw_steps(STEPS, LENGTHS, 3, SEEDS), draw_steps(STEPS[1:2], LENGTHS[1:2], 3, SEEDS[1:2])
    assert torch.equal(together.chosen[1:2], alone.chosen)
    other = [draw_steps(STEPS, LENGTHS, 3, SEEDS + shift).chosen.tolist() for shift in range(9)]
    assert any(chosen != together.chosen.tolist() for chosen in other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "at least 1"),
        ({"lengths": LENGTHS[:2]}, r"Expected \[B, C\]"),
        ({"steps": STEPS[0]}, r"Expected \[B, C\]"),
        ({"seeds": SEEDS.float()}, "Expected integers"),
        ({"seeds": -SEEDS}, "at least 0"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draw_steps(**({"steps": STEPS, "lengths": LENGTHS, "samples": 2, "seeds": SEEDS} | changes))
