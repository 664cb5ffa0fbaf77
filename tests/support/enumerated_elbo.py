"""A tiny completion whose ELBO can be enumerated, and a batch of them for gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dta_plugin.diffusion import MaskDraws, draw_masks
from dta_plugin.diffusion.objectives.elbo import masked_log_probs, sample_term
from tests.support.tiny_diffusion import FAMILY, diffusion_model, padded

Gradients = dict[str, torch.Tensor]


@dataclass
class Batch:
    """Rows with prompts of different lengths (left padded) and completions of different lengths (right padded)."""

    model: PreTrainedModel
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor
    width: int

    def draws(self, samples: int, first_seed: int = 100, **options: object) -> MaskDraws:
        return draw_masks(self.lengths, samples, torch.arange(len(self.lengths)) + first_seed, **options)

    def term(self, draws: MaskDraws, sample: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """ELBO terms of the model as it is now."""
        return sample_term(self.model, FAMILY, self.input_ids, self.attention_mask, draws, sample, self.width, rows)

    def terms(self, draws: MaskDraws) -> torch.Tensor:
        """[B, n], with graph."""
        return torch.stack([self.term(draws, j) for j in range(draws.samples)], dim=1)

    def take_gradients(self) -> Gradients:
        """Of every parameter; cleared afterwards."""
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def move(self, size: float = 0.02) -> None:
        """A step away from the policy that generated."""
        generator = torch.Generator().manual_seed(5)
        for p in self.model.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def make_batch(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = (6, 3, 8, 1, 5)) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 31, (count,), generator=generator).tolist()

    prompts, prompt_mask = padded([tokens(n) for n in (4, 2, 1, 3, 4)[: len(lengths)]])
    completions, mask = padded([tokens(n) for n in lengths], left=False)
    return Batch(
        diffusion_model(dtype=dtype),
        torch.cat([prompts, completions], dim=1),
        torch.cat([prompt_mask, mask], dim=1),
        torch.tensor(lengths),
        torch.tensor([1.0, -0.5, 0.25, -1.5, 0.75])[: len(lengths)],
        completions.shape[1],
    )


def largest_difference(one: Gradients, other: Gradients) -> float:
    """Of two sets of gradients, relative to the largest entry."""
    assert one.keys() == other.keys()
    top = max(float(g.abs().max()) for g in one.values())
    return max(float((one[n] - other[n]).abs().max()) for n in one) / top


class Enumerated:
    """All 2^L maskings of one completion: scores[s, i] = log p(y_i | the tokens in the bits of s are masked)."""

    def __init__(self, length: int = 5) -> None:
        self.length = length
        self.prompt, self.completion = [3, 9, 4], [5, 12, 7, 20, 11, 6][:length]
        ids = torch.tensor([self.prompt + self.completion]).repeat(2**length, 1)
        self.masks = torch.tensor(list(itertools.product([False, True], repeat=length)))
        with torch.no_grad():
            self.scores = masked_log_probs(diffusion_model(dtype=torch.float64), FAMILY, ids, None, self.masks)
        self.sums = self.scores.sum(dim=1)  # unmasked tokens score 0
        self.counts = self.masks.sum(dim=1)

    def index(self, masks: torch.Tensor) -> torch.Tensor:
        """Which masking: [...] of bool masks [..., L]."""
        return (masks * 2 ** torch.arange(self.length - 1, -1, -1)).sum(dim=-1)

    def order_log_likelihoods(self) -> torch.Tensor:
        """[L!] log-likelihood of the completion for every order of unmasking."""
        values = []
        for order in itertools.permutations(range(self.length)):
            hidden, total = torch.ones(self.length, dtype=torch.bool), 0.0
            for token in order:
                total += float(self.scores[self.index(hidden), token])
                hidden[token] = False
            values.append(total)
        return torch.tensor(values, dtype=torch.float64)
