"""A native decoder becomes a diffusion LM by its config alone, and stays one when saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from dta_plugin.diffusion import DiffusionFamily, bidirectional, family_from_config, predictions
from dta_plugin.errors import InvalidInputError
from tests.support.models import random_model, tiny_config

IDS = torch.tensor([[3, 4, 31, 6, 31, 8]])


def test_the_given_config_is_left_alone() -> None:
    causal = tiny_config("llama", vocab_size=32)
    assert bidirectional(causal, mask_token_id=31).is_causal is False
    assert getattr(causal, "is_causal", True) and not hasattr(causal, "diffusion")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_family_and_the_predictions_survive_saving(family: str, tmp_path: Path) -> None:
    config = bidirectional(
        tiny_config(family, vocab_size=32), mask_token_id=31, is_shifted=True, block_length=4, forbidden_token_ids=(5,)
    )
    expected = DiffusionFamily(
        name=family,
        mask_token_id=31,
        pad_token_id=0,
        eos_token_ids=(2,),
        is_shifted=True,
        block_length=4,
        forbidden_token_ids=(5,),
    )
    model = random_model(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.is_causal is False
    assert family_from_config(model.config) == family_from_config(again.config) == expected
    torch.testing.assert_close(predictions(again, expected, IDS), predictions(model, expected, IDS))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_several_end_tokens_are_kept() -> None:
    config = bidirectional(tiny_config("qwen3", eos_token_id=[2, 7], vocab_size=32), mask_token_id=31)
    assert family_from_config(config).eos_token_ids == (2, 7)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"\[32\] with a vocabulary of 32"):
        bidirectional(tiny_config("qwen3", vocab_size=32), mask_token_id=32)


def test_layers_that_carry_a_state_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="linear_attention layers"):
        bidirectional(Qwen3NextConfig(num_hidden_layers=4), mask_token_id=5)


def test_a_plain_config_has_no_family() -> None:
    with pytest.raises(InvalidInputError, match="no `diffusion` entry"):
        family_from_config(tiny_config("qwen3"))
