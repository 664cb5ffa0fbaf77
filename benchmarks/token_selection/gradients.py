"""Gradients of every sampled token's log-prob, of the quickstart's base model on its own task: real ones, and exact.

A row's gradients are coordinates in the space that a prompt's tokens span, so that inner products are those of the
full gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipes.quickstart.rewards import right_answer

_LONGEST = 24


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Completions of one prompt. rows: per completion float64 [T, R]. rewards: float [S]."""

    rows: list[np.ndarray]
    rewards: np.ndarray

    def groups(self, size: int) -> Iterator[list[np.ndarray]]:
        """Rows times their advantages, of groups whose rewards differ."""
        for first in range(0, len(self.rows), size):
            rewards = self.rewards[first : first + size]
            if rewards.std() > 0:
                advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
                yield [row * a for row, a in zip(self.rows[first : first + size], advantages, strict=True)]


def sampled(folder: Path, prompts: int, completions: int) -> list[Prompt]:
    """folder: what recipes/quickstart/build.py wrote. Completions are sampled at temperature 1."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    lines = (folder / "data" / "train.jsonl").read_text().splitlines()[:prompts]
    found = []
    for line in lines:
        exercise = json.loads(line)
        prompt = tokenizer(exercise["prompt"], return_tensors="pt").input_ids
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": _LONGEST}
        with torch.no_grad():
            ids = model.generate(prompt.repeat(completions, 1), pad_token_id=tokenizer.pad_token_id, **options)
        texts = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
        rewards = np.array(right_answer(texts, [exercise["answer"]] * completions))
        gradients = [_gradients(model, row, prompt.shape[1], tokenizer.eos_token_id) for row in ids]
        found.append(Prompt(_coordinates(gradients), rewards))
    return found


def _gradients(model: PreTrainedModel, row: torch.Tensor, prompt: int, end: int) -> torch.Tensor:
    """[T, parameters], up to the end mark."""
    completion = row[prompt:]
    ends = (completion == end).nonzero()
    completion = completion[: int(ends[0]) + 1] if len(ends) else completion
    tokens = len(completion)
    logits = model(row[None, : prompt + tokens], logits_to_keep=tokens + 1).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    parts = torch.autograd.grad(logprobs, list(model.parameters()), torch.eye(tokens), is_grads_batched=True)
    return torch.cat([part.reshape(tokens, -1) for part in parts], dim=1)


def _coordinates(gradients: list[torch.Tensor]) -> list[np.ndarray]:
    """Rows of a matrix whose products are the gradients' inner products."""
    everything = torch.cat(gradients)
    values, vectors = np.linalg.eigh((everything @ everything.T).double().numpy())
    coordinates = vectors * np.sqrt(values.clip(0))
    return np.split(coordinates, np.cumsum([len(each) for each in gradients])[:-1])
