"""One set of options: defaults that sample, and errors for what cannot be or would not be looked at."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from dta_plugin.errors import InvalidInputError
from dta_plugin.training.diffusion.options import OBJECTIVES, DiffusionOptions


def test_every_option_says_what_it_does_and_for_whom() -> None:
    for option in fields(DiffusionOptions):
        assert option.metadata["help"].endswith(".")
        assert set(option.metadata["objectives"]) <= set(OBJECTIVES)


@pytest.mark.parametrize(
    ("length", "attention_block", "expected"),
    [(256, None, (32, 16)), (256, 4, (4, 2)), (8, None, (8, 4)), (7, None, (7, 4)), (100, None, (25, 13))],
)
def test_blocks_and_steps(length: int, attention_block: int | None, expected: tuple[int, int]) -> None:
    """The model's attention blocks, else the largest divisor up to 32; two tokens per call. expected: of a block."""
    found = DiffusionOptions().sampler_config(length, 0.5, attention_block)
    assert (found.block_length, found.calls_per_block) == expected
    assert (found.gen_length, found.temperature) == (length, 0.5)


def test_what_is_given_goes_first() -> None:
    found = DiffusionOptions(block_length=8, diffusion_steps=64).sampler_config(64, 1.0, attention_block_length=4)
    assert (found.block_length, found.steps) == (8, 64)
    fast = DiffusionOptions(confidence_threshold=0.9, kv_cache="dual").sampler_config(64, 1.0)
    assert (fast.confidence_threshold, fast.kv_cache, fast.steps) == (0.9, "dual", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "Expected one of bgpo, diffu-grpo, gdsd, trajectory, vrpo"),
        ({"num_elbo_samples": 3, "coupled_masks": True}, "even number"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"mask_token_id": -1}, "at least 0"),
        ({"objective": "vrpo", "bound_clip": 0.2}, r"bound_clip=0\.2 .*Expected bound_clip=None.*objective='bgpo'"),
        ({"objective": "diffu-grpo", "mask_form": "t"}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
        ({"objective": "trajectory", "mask_form": "t"}, "objective='bgpo' or 'gdsd' or 'vrpo'"),
        ({"objective": "trajectory", "score_fillers": True}, "objective='bgpo' or 'gdsd' or 'vrpo' or 'diffu-grpo'"),
        ({"objective": "gdsd", "length_norm": "none"}, "objective='bgpo' or 'trajectory' or 'vrpo'"),
        ({"objective": "gdsd", "advantage_scale": -1.0}, "Expected a finite value above 0"),
        ({"objective": "gdsd", "advantage_scale": float("nan")}, "Expected a finite value above 0"),
        ({"advantage_scale": 0.5}, "objective='gdsd'"),
        ({"score_fillers": True}, "Expected score_fillers=False .leave it out., or objective='bgpo' or 'gdsd'"),
        ({"coupled_masks": True}, "coupled_masks=True with objective='trajectory', which does not use it"),
        ({"prompt_mask_probability": 0.3}, "objective='diffu-grpo'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DiffusionOptions(**options)
