"""Trees of the streaming benchmark that have more than one fork on a path. What is random is the same in every run."""

from __future__ import annotations

import torch

from benchmarks.common.workloads import Workload


def bushy(prompt: int, branch: int, answer: int, branches: int, answers: int, vocab: int) -> Workload:
    """A prompt, `branches` continuations of it, and `answers` to each; all but the prompt is scored."""
    random = _Runs(vocab)
    shared = random.one(prompt)
    sequences = [
        torch.cat([shared, middle, end])
        for middle in random.siblings(branches, branch)
        for end in random.siblings(answers, answer)
    ]
    return Workload("bushy", sequences, [prompt] * len(sequences), _advantages(len(sequences)))


def comb(prompt: int, length: int, turns: int, vocab: int) -> Workload:
    """A conversation with two answers per turn, one of which it goes on from; each ends a sequence and is scored."""
    random = _Runs(vocab)
    sequences, prompts, context = [], [], random.one(prompt)
    for _ in range(turns):
        answers = [torch.cat([context, answer]) for answer in random.siblings(2, length)]
        sequences += answers
        prompts += [len(context)] * 2
        context = torch.cat([answers[0], random.one(length)])
    return Workload("comb", sequences, prompts, _advantages(len(sequences)))


class _Runs:
    """Random tokens, the same in every run."""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.generator = vocab, torch.Generator().manual_seed(0)

    def one(self, length: int) -> torch.Tensor:
        return torch.randint(self.vocab, (length,), generator=self.generator)

    def siblings(self, count: int, length: int) -> torch.Tensor:
        """[count, length], different from the first token on."""
        runs = torch.randint(self.vocab, (count, length), generator=self.generator)
        runs[:, 0] = torch.randperm(self.vocab, generator=self.generator)[:count]
        return runs


def _advantages(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1))
