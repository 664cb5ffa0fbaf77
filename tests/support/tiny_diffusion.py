"""Tiny random diffusion LMs: native decoders that attend in both directions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dta_plugin.diffusion import DiffusionFamily
from tests.support.models import random_model, tiny_config

VOCABULARY = 32
MASK, PAD, EOS = 31, 0, 2
FAMILY = DiffusionFamily(name="tiny", mask_token_id=MASK, pad_token_id=PAD, eos_token_ids=(EOS,))
SHIFTED = DiffusionFamily(name="tiny", mask_token_id=MASK, pad_token_id=PAD, eos_token_ids=(EOS,), is_shifted=True)


def diffusion_model(
    family: str = "qwen3", dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A tiny random decoder with config.is_causal False, in evaluation mode."""
    config = tiny_config(family, **({"vocab_size": VOCABULARY} | changes))
    config.is_causal = False
    return random_model(config, dtype, seed, attention)


def shifted_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, from now on with the hidden state of token i at position i - 1; the last gets token 0's."""

    def shift(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.roll(-1, dims=1)
        return output

    getattr(model, model.base_model_prefix).register_forward_hook(shift)
    return model


def padded(rows: list[list[int]], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (ids [B, S], attention mask [B, S]), padded left or right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask
