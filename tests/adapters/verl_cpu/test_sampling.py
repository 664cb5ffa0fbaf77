"""The CPU rollout's samples: their log-probs are the model's, their limits are kept, greedy is greedy."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dta_plugin.adapters.verl_cpu.sampling import Request, Sample, Sampling, sample
from dta_plugin.errors import InvalidInputError

VOCABULARY, PAD, EOS = 20, 0, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config).eval()


def distribution(model: Qwen3ForCausalLM, request: Request, tokens: list[int]) -> torch.Tensor:
    """Log-probs of every token at every sampled position, from the whole sequence at once: [tokens, vocabulary]."""
    logits = model(torch.tensor([request.prompt + tokens])).logits[0, len(request.prompt) - 1 : -1]
    return (logits / request.sampling.temperature).log_softmax(-1)


def requests(limit: int, sampling: Sampling) -> list[Request]:
    return [Request(prompt, sampling, limit + row) for row, prompt in enumerate(PROMPTS) for _ in range(4)]


@torch.no_grad()
def test_logprobs_are_the_models(model: Qwen3ForCausalLM) -> None:
    """Left padding, a shared cache and neighbours change nothing, for several temperatures in one batch."""
    asked = requests(9, Sampling()) + requests(9, Sampling(temperature=0.5))
    found = sample(model, asked, {EOS}, PAD)
    for request, got in zip(asked, found, strict=True):
        dense = distribution(model, request, got.tokens).gather(-1, torch.tensor(got.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(got.logprobs), dense, atol=2e-6, rtol=2e-6)
    assert len({tuple(got.tokens) for got in found}) > len(found) // 2, "samples of one prompt differ"


@torch.no_grad()
def test_truncated_distributions(model: Qwen3ForCausalLM) -> None:
    """Top-k and top-p leave fewer tokens, and the log-probs are those among them."""
    asked = [Request(PROMPTS[0], sampling, 1) for sampling in (Sampling(top_k=2), Sampling(top_p=0.5))] * 20
    for request, got in zip(asked, sample(model, asked, {EOS}, PAD), strict=True):
        dense = distribution(model, request, got.tokens)[0].exp()
        kept, order = dense.sort(descending=True)
        count = request.sampling.top_k or int((kept.cumsum(0) < request.sampling.top_p).sum()) + 1
        assert got.tokens[0] in order[:count].tolist()
        assert got.logprobs[0] == pytest.approx(math.log(dense[got.tokens[0]] / kept[:count].sum()), abs=1e-5)


def test_limits_and_ends(model: Qwen3ForCausalLM) -> None:
    asked = requests(3, Sampling(temperature=2.0)) * 10
    found = sample(model, asked, {EOS}, PAD)
    for request, got in zip(asked, found, strict=True):
        assert len(got.logprobs) == len(got.tokens) <= request.max_tokens
        assert EOS not in got.tokens[:-1]
        assert got.tokens[-1] == EOS or len(got.tokens) == request.max_tokens
    assert {got.tokens[-1] == EOS for got in found} == {True, False}


@torch.no_grad()
def test_greedy(model: Qwen3ForCausalLM) -> None:
    request = Request(PROMPTS[2], Sampling(temperature=0), 5)
    first, second = sample(model, [request, request], set(), PAD)
    dense = distribution(model, Request(request.prompt, Sampling(), 5), first.tokens)
    assert first == second == Sample(dense.argmax(-1).tolist(), first.logprobs)


def test_parameters_of_the_agent_loop() -> None:
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    assert Request.parse([3], params, 24) == Request([3], Sampling(0.7, 0.9, 0, 1.0), 24)
    assert Request.parse([3], params | {"max_tokens": 5, "top_k": 4}, 24) == Request([3], Sampling(0.7, 0.9, 4), 5)
    with pytest.raises(InvalidInputError, match=r"\['stop'\]"):
        Request.parse([3], params | {"stop": "."}, 24)
