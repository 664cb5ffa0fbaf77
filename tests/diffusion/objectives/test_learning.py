"""The whole loop, without a framework: sample, score, bound, step. A tiny model learns a toy reward."""

from __future__ import annotations

import torch

from dta_plugin.diffusion import SamplerConfig, draw_masks, sample
from dta_plugin.diffusion.objectives.bgpo import per_sample_losses
from dta_plugin.diffusion.objectives.elbo import sample_term
from tests.support.tiny_diffusion import FAMILY, diffusion_model

TARGET, WIDTH, GROUP, SAMPLES = 7, 6, 16, 2


def test_a_tiny_model_learns_to_write_a_token() -> None:
    model = diffusion_model(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    config = SamplerConfig(gen_length=WIDTH, block_length=3, steps=4, temperature=1.0)
    prompts = torch.tensor([[3, 4, 5]]).repeat(GROUP, 1)
    rewards = []
    for step in range(100):
        completions = sample(model, FAMILY, prompts, None, config, generator).completion_ids
        reward = (completions == TARGET).float().mean(dim=1)
        rewards.append(float(reward.mean()))
        advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
        ids = torch.cat([prompts, completions], dim=1)
        draws = draw_masks(torch.full((GROUP,), WIDTH), SAMPLES, torch.arange(GROUP) + step * GROUP)

        def term(j: int, rows: torch.Tensor, ids=ids, draws=draws) -> torch.Tensor:
            return sample_term(model, FAMILY, ids, None, draws, j, WIDTH, rows)

        for part in per_sample_losses(term, advantages, SAMPLES, length_scale=torch.full((GROUP,), 1 / WIDTH)):
            part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rewards[-1] > 0.95:
            break
    assert rewards[0] < 0.15
    assert rewards[-1] > 0.9
