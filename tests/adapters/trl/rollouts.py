"""Rollouts that no model sampled: scripted turns for `rollout_func`, with log-probs as vLLM would report them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.adapters.trl.support import VOCABULARY

_EOS = 2


@dataclass(frozen=True)
class Rollouts:
    """A `rollout_func`: two turns of which pairs share the first, and an answer of the environment between.

    The tokens depend on the step alone. Log-probs are the policy's own, off by Gaussian noise, as another engine's
    would be. environment: return `env_mask`, 0 at the environment's tokens, and NaN log-probs there, which an engine
    that did not sample them cannot know. The last of every three rollouts ends by EOS.
    """

    noise: float = 0.05
    environment: bool = False

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        generator = torch.Generator().manual_seed(1000 + trainer.state.global_step)

        def turn(longest: int) -> list[int]:
            length = int(torch.randint(2, longest + 1, (), generator=generator))
            return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

        prompt_ids = [trainer.processing_class(text)["input_ids"] for text in prompts]
        completions, masks, logprobs = [], [], []
        for row, prompt in enumerate(prompt_ids):
            if row % 2 == 0:
                first, answer = turn(3), turn(3)
            last = turn(3) + ([_EOS] if row % 3 == 2 else [])
            completion = first + answer + last
            mask = [1] * len(first) + [0] * len(answer) + [1] * len(last)
            policy = _policy_logprobs(trainer, prompt, completion)
            sampled = policy + self.noise * torch.randn(len(completion), generator=generator)
            if self.environment:
                sampled[torch.tensor(mask) == 0] = float("nan")
            completions.append(completion)
            masks.append(mask)
            logprobs.append(sampled.tolist())
        output = {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}
        return output | {"env_mask": masks} if self.environment else output


@torch.no_grad()
def _policy_logprobs(trainer: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    log_p = (logits / trainer.temperature).log_softmax(dim=-1)
    return log_p.gather(1, torch.tensor(completion)[:, None])[:, 0]


def as_if_vllm(trainer: Any) -> None:
    """Make the trainer correct for its sampler as it does with vLLM, without vLLM."""
    trainer.use_vllm = True
    trainer._last_loaded_step = -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
