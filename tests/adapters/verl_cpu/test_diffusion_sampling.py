"""The rollout's canvases are those of `dta_plugin.diffusion.sample`, whatever arrives together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from dta_plugin.adapters.verl_cpu.diffusion_sampling import diffusion_sampler
from dta_plugin.adapters.verl_cpu.sampling import Request, Sampling
from dta_plugin.diffusion import bidirectional, family_of, sample
from dta_plugin.errors import InvalidInputError
from tests.support.models import random_model, tiny_config
from tests.support.tiny_diffusion import EOS, MASK, PAD, VOCABULARY

pytest.importorskip("dta_plugin.adapters.verl")
LENGTH = 8
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = bidirectional(tiny_config("qwen3", vocab_size=VOCABULARY), mask_token_id=MASK)
    config.pad_token_id, config.eos_token_id = PAD, EOS
    return random_model(config, torch.float32, 0, "sdpa")


def rollout(**options: Any) -> Any:
    given = {"block_length": 4, "diffusion_steps": 8} | options
    return OmegaConf.create({"response_length": LENGTH, "custom": {"dta": {"diffusion": given}}})


def requests(*temperatures: float) -> list[Request]:
    pairs = zip(PROMPTS, temperatures, strict=True)
    return [Request(prompt, Sampling(temperature=temperature), LENGTH) for prompt, temperature in pairs]


def alone(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], int]:
    config = canvas_options()
    found = sample(model, family_of(model.config), torch.tensor([prompt]), config=config)
    return found.completion_ids[0].tolist(), int(found.lengths)


def canvas_options() -> Any:
    from dta_plugin.adapters.verl_plugin.diffusion.options import diffusion_options

    found = diffusion_options(rollout())
    assert found is not None
    return found.sampler_config(LENGTH, 0.0)


@pytest.mark.parametrize("end", [EOS, None])
def test_greedy_canvases(model: PreTrainedModel, end: int | None) -> None:
    """end None: a token that the model does write, so that responses end early."""
    written = [alone(model, prompt)[0] for prompt in PROMPTS]
    end = written[0][3] if end is None else end
    sampler = diffusion_sampler(rollout())
    assert sampler is not None
    found = sampler(model, requests(0.0, 0.0, 0.0, 0.0), {end}, PAD)
    for row, tokens in zip(found, written, strict=True):
        assert row.tokens == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
        assert MASK not in row.tokens and row.logprobs == []
    whole = diffusion_sampler(rollout(objective="bgpo", score_fillers=True))
    assert whole is not None
    for row, kept in zip(whole(model, requests(0.0, 0.0, 0.0, 0.0), {end}, PAD), found, strict=True):
        assert row.tokens == kept.tokens + [family_of(model.config).eos_token_ids[0]] * (LENGTH - len(kept.tokens))


def test_the_record_of_steps_goes_with_a_response(model: PreTrainedModel) -> None:
    sampler = diffusion_sampler(rollout())
    assert sampler is not None
    for prompt, row in zip(PROMPTS, sampler(model, requests(0.0, 0.0, 0.0, 0.0), {EOS}, PAD), strict=True):
        found = sample(model, family_of(model.config), torch.tensor([prompt]), config=canvas_options())
        expected = {"canvas_ids": found.canvas_ids[0].tolist(), "commit_steps": found.steps[0].tolist()}
        assert row.extra == expected and row.extra["canvas_ids"][: len(row.tokens)] == row.tokens
    plain = diffusion_sampler(rollout(objective="bgpo"))
    assert plain is not None
    assert all(row.extra == {} for row in plain(model, requests(0.0, 0.0, 0.0, 0.0), {EOS}, PAD))


def test_temperatures_do_not_mix(model: PreTrainedModel) -> None:
    sampler = diffusion_sampler(rollout())
    assert sampler is not None
    torch.manual_seed(0)
    draws = [sampler(model, requests(0.0, 5.0, 0.0, 5.0), (), PAD) for _ in range(3)]
    for greedy in (0, 2):
        assert [draw[greedy].tokens for draw in draws] == [alone(model, PROMPTS[greedy])[0]] * 3
    for drawn in (1, 3):
        assert len({tuple(draw[drawn].tokens) for draw in draws}) == 3
        assert all(len(draw[drawn].tokens) == LENGTH for draw in draws)  # no ends: ignore_eos


@pytest.mark.parametrize(
    "request_",
    [Request([3], Sampling(top_p=0.9), LENGTH), Request([3], Sampling(), LENGTH - 1)],
    ids=["top_p", "length"],
)
def test_what_a_canvas_cannot_do(model: PreTrainedModel, request_: Request) -> None:
    sampler = diffusion_sampler(rollout())
    assert sampler is not None
    with pytest.raises(InvalidInputError, match="nothing but a temperature"):
        sampler(model, [request_], {EOS}, PAD)


def test_only_with_options() -> None:
    for custom in (None, {"dta": {"verify": "first"}}):
        assert diffusion_sampler(OmegaConf.create({"response_length": LENGTH, "custom": custom})) is None
