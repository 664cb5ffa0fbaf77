"""Batched sampling from a diffusion LM, for the rollout server: canvases of `rollout.response_length` tokens.

Promises: what `dta_plugin.diffusion.sample` promises, at the temperature of the request; no log-probs, which such a
model does not have. A response ends with its first end token, or, with `score_fillers`, is the whole canvas. For
objective "trajectory" the record of its steps goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

import dta_plugin.diffusion as diffusion
from dta_plugin.adapters.verl_cpu.sampling import Request, Sample, Sampling
from dta_plugin.errors import InvalidInputError
from dta_plugin.training.diffusion.batch import CANVAS_IDS, COMMIT_STEPS
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.padding import left_padded

Sampler = Callable[[PreTrainedModel, list[Request], Collection[int], int], list[Sample]]


def diffusion_sampler(rollout: Any) -> Sampler | None:
    """For the diffusion options of a rollout config; None where it has none."""
    if "diffusion" not in ((rollout.get("custom") or {}).get("dta") or {}):
        return None
    from dta_plugin.adapters.verl_plugin.diffusion.options import diffusion_options

    options = diffusion_options(rollout)
    assert options is not None
    length = int(rollout.get("response_length"))

    def sample(model: PreTrainedModel, requests: list[Request], eos: Collection[int], pad: int) -> list[Sample]:
        return sample_completions(model, requests, eos, pad, options, length)

    return sample


def sample_completions(
    model: PreTrainedModel,
    requests: list[Request],
    eos: Collection[int],
    pad: int,
    options: DiffusionOptions,
    length: int,
) -> list[Sample]:
    """One sample per request, in one batch per temperature. eos: what ends a response, with the model's own ends.

    length: of the canvas. Raises InvalidInputError for requests of another one, and for top-k, top-p and penalties.
    """
    family = options.family(model.config)
    ends = tuple(dict.fromkeys((*family.eos_token_ids, *eos))) if eos else ()
    family = replace(family, eos_token_ids=ends)
    found: dict[int, Sample] = {}
    for temperature in dict.fromkeys(_temperature(request, length) for request in requests):
        chosen = [i for i, request in enumerate(requests) if request.sampling.temperature == temperature]
        ids, mask = left_padded([requests[i].prompt for i in chosen], pad)
        sampler = options.sampler_config(length, temperature, family.block_length)
        sampled = diffusion.sample(model, family, ids, mask, sampler)
        lengths = [length] * len(chosen) if options.score_fillers else sampled.lengths.tolist()
        for i, tokens, kept in zip(chosen, sampled.completion_ids.tolist(), lengths, strict=True):
            found[i] = Sample(tokens[:kept], [])
        if options.reads_rollout:
            for i, canvas, steps in zip(chosen, sampled.canvas_ids.tolist(), sampled.steps.tolist(), strict=True):
                found[i].extra.update({CANVAS_IDS: canvas, COMMIT_STEPS: steps})
    return [found[i] for i in range(len(requests))]


def _temperature(request: Request, length: int) -> float:
    sampling = request.sampling
    if sampling != Sampling(temperature=sampling.temperature) or request.max_tokens != length:
        raise InvalidInputError(
            f"Got a request for {request.max_tokens} tokens with {sampling}. Expected rollout.response_length={length} "
            "tokens, and nothing but a temperature: a canvas has one length, and no order in which top-k, top-p or "
            "penalties could apply. Set rollout.top_p=1, top_k=-1 (and those of val_kwargs), and use one-turn agents."
        )
    return sampling.temperature
