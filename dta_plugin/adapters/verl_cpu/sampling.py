"""Batched sampling from a Hugging Face model: what the rollout server does with the requests that wait.

Promises: every token is drawn from the distribution that its request asks for, and its log-prob is the sampler's own,
under that distribution (temperature, top-k and top-p applied, as vLLM's `processed_logprobs`). Requests of one batch
may differ in everything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.training.padding import left_padded


@dataclass(frozen=True)
class Sampling:
    """What one model call can have in common. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Request:
    """A prompt, the distribution to sample from, and the most tokens to sample."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int

    @classmethod
    def parse(cls, prompt: list[int], params: dict[str, Any], default_max_tokens: int) -> Request:
        """From the sampling parameters of verl's agent loop; InvalidInputError for those that are not known here."""
        params = {name: value for name, value in params.items() if name != "logprobs"}  # always given
        max_tokens = params.pop("max_tokens", params.pop("max_new_tokens", default_max_tokens))
        unknown = params.keys() - Sampling.__dataclass_fields__.keys()
        if unknown:
            raise InvalidInputError(
                f"The CPU rollout got the sampling parameters {sorted(unknown)}. It knows max_tokens, logprobs, "
                f"{', '.join(Sampling.__dataclass_fields__)}."
            )
        params["top_k"] = max(params.get("top_k", 0), 0)  # verl writes -1 for all
        return cls(list(prompt), Sampling(**params), max(int(max_tokens), 1))


@dataclass(frozen=True)
class Sample:
    """The sampled tokens, the end token included, and their log-probs. extra: what verl carries to the update."""

    tokens: list[int]
    logprobs: list[float]
    extra: dict[str, Any] = field(default_factory=dict)


def sample(model: PreTrainedModel, requests: list[Request], eos: Collection[int], pad: int) -> list[Sample]:
    """One sample per request; one call of `generate` per kind of distribution."""
    found: dict[int, Sample] = {}
    for sampling in dict.fromkeys(request.sampling for request in requests):
        chosen = [i for i, request in enumerate(requests) if request.sampling == sampling]
        found.update(zip(chosen, _sample_alike(model, [requests[i] for i in chosen], eos, pad), strict=True))
    return [found[i] for i in range(len(requests))]


@torch.inference_mode()
def _sample_alike(model: PreTrainedModel, requests: list[Request], eos: Collection[int], pad: int) -> list[Sample]:
    """Samples of requests that share a distribution. Rows may have different limits: longer samples are cut."""
    ids, mask = left_padded([request.prompt for request in requests], pad)
    generate: Any = model.generate
    output = generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=_config(requests[0].sampling, max(request.max_tokens for request in requests), eos, pad),
    )
    tokens = output.sequences[:, ids.shape[1] :]
    # `scores` are the logits that were sampled from, as a tuple of [rows, vocabulary] with an entry per token.
    logprobs = torch.stack(output.scores, 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    samples = []
    for request, row, values in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        end = min(end, request.max_tokens)
        samples.append(Sample(row[:end], values[:end]))
    return samples


def _config(sampling: Sampling, max_tokens: int, eos: Collection[int], pad: int) -> GenerationConfig:
    greedy = sampling.temperature == 0
    drawn = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        do_sample=not greedy,
        **drawn,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(eos),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
    )
