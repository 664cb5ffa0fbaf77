"""Which family a config belongs to: ids, shift and blocks of the released models, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from dta_plugin.diffusion.families import family_of
from dta_plugin.diffusion.formats import native_config
from dta_plugin.diffusion.native import bidirectional
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.support.diffusion_checkpoints import released_config

LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "mask_token_id": 126336,
    "model_type": "llada",
    "pad_token_id": 126081,
    "vocab_size": 126464,
}
ILLADA_8B: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "eos_token_id": 2,
    "model_type": "illada",
    "pad_token_id": 1,
    "vocab_size": 155136,
}
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "eos_token_id": 151643,
    "mask_token_id": 151666,
    "model_type": "Dream",
    "pad_token_id": 151643,
    "vocab_size": 152064,
}
SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "block_size": 4,
    "eos_token_id": 151643,
    "model_type": "sdar",
    "vocab_size": 151936,
}
A2D: dict[str, Any] = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "eos_token_id": 151645,
    "model_type": "a2d-qwen3",
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    "config, mask, pad, ends, is_shifted, block_length",
    [
        (LLADA_8B, 126336, 126081, (126081, 126348), False, None),
        (ILLADA_8B, 5, 1, (2,), False, None),
        (DREAM_7B, 151666, 151643, (151643, 151645), True, None),
        (SDAR, 151669, 151643, (151643, 151645), False, 4),
        (A2D, 151669, 151643, (151645,), False, None),
    ],
    ids=["llada", "illada", "dream", "sdar", "a2d"],
)
def test_released_models_have_the_ids_of_their_tokenizers(
    config: dict[str, Any],
    mask: int,
    pad: int,
    ends: tuple[int, ...],
    is_shifted: bool,
    block_length: int | None,
) -> None:
    family = family_of(config)
    assert (family.mask_token_id, family.pad_token_id, family.eos_token_ids) == (mask, pad, ends)
    assert (family.is_shifted, family.block_length) == (is_shifted, block_length)
    assert family.name == config["model_type"].lower()


def test_entries_of_the_config_win_over_what_is_known_and_arguments_over_both() -> None:
    family = family_of(SDAR | {"mask_token_id": 11, "pad_token_id": 12, "block_size": 16, "eos_token_id": [13, 14]})
    assert (family.mask_token_id, family.pad_token_id, family.block_length) == (11, 12, 16)
    assert family.eos_token_ids == (13, 14, 151645)
    family = family_of(SDAR | {"mask_token_id": 11}, mask_token_id=21, is_shifted=True, block_length=32)
    assert (family.mask_token_id, family.is_shifted, family.block_length) == (21, True, 32)


def test_a_config_object_says_what_its_entries_say() -> None:
    entries = released_config("sdar")
    assert family_of(native_config(entries)) == family_of(entries)


def test_tiny_vocabularies_have_none_of_the_known_tokens() -> None:
    family = family_of(released_config("sdar"))
    assert (family.mask_token_id, family.pad_token_id, family.eos_token_ids) == (50, None, (3,))


def test_decoders_made_bidirectional_say_themselves_what_they_are() -> None:
    config = bidirectional(Qwen3Config(vocab_size=64, eos_token_id=2), mask_token_id=63, block_length=8)
    for given in (config, config.to_dict()):
        family = family_of(given)
        assert (family.name, family.mask_token_id, family.block_length) == ("qwen3", 63, 8)
        assert family.eos_token_ids == (2,) and not family.is_shifted
    assert family_of(config, block_length=4, is_shifted=True, mask_token_id=62).block_length == 4


def test_an_unknown_family_is_an_error_that_lists_the_known_ones_and_the_way_by_hand() -> None:
    with pytest.raises(UnsupportedError) as error:
        family_of(LlamaConfig())
    for word in ("'llama'", "llada", "dream", "sdar", "a2d-qwen3", "mask_token_id", "is_shifted", "block_length"):
        assert word in str(error.value)


def test_an_unknown_family_is_described_by_hand_with_mask_and_shift() -> None:
    family = family_of(LlamaConfig(vocab_size=64), mask_token_id=63, is_shifted=False, block_length=8)
    assert (family.name, family.mask_token_id, family.is_shifted, family.block_length) == ("llama", 63, False, 8)
    with pytest.raises(UnsupportedError):
        family_of(LlamaConfig(vocab_size=64), mask_token_id=63)


@pytest.mark.parametrize(
    "config",
    [
        LLADA_8B | {"architectures": ["LLaDAMoEModelLM"]},
        {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "vocab_size": 157184},
        {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "vocab_size": 151936},
    ],
    ids=["llada-moe", "llada2", "sdar-moe"],
)
def test_mixtures_of_experts_are_not_taken_for_the_dense_family(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"4\.57\.1"):
        family_of(config)
    assert family_of(config, mask_token_id=7, is_shifted=False).mask_token_id == 7


def test_diffusion_gemma_is_refused_with_the_reasons_even_by_hand() -> None:
    for arguments in ({}, {"mask_token_id": 4, "is_shifted": False}):
        with pytest.raises(UnsupportedError, match=r"random tokens.*causal encoder.*conditioned.*Supported: llada"):
            family_of(AutoConfig.for_model("diffusion_gemma"), **arguments)


def test_a_mask_outside_the_vocabulary_is_an_error() -> None:
    config = released_config("dream")
    del config["mask_token_id"]
    with pytest.raises(InvalidInputError, match=r"151666 in a vocabulary of 56.*tokenizer\.mask_token_id"):
        family_of(config)
    assert family_of(config, mask_token_id=55).mask_token_id == 55


def test_families_without_a_known_mask_token_ask_for_it() -> None:
    with pytest.raises(InvalidInputError, match="mask_token_id"):
        family_of({"model_type": "a2d-llama", "vocab_size": 64})
    assert family_of({"model_type": "a2d-llama", "vocab_size": 64}, mask_token_id=63).mask_token_id == 63


def test_block_models_without_a_block_size_ask_for_it() -> None:
    for config in (
        {name: value for name, value in SDAR.items() if name != "block_size"},
        A2D | {"_name_or_path": "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"},
    ):
        with pytest.raises(InvalidInputError, match="block_length"):
            family_of(config)
        assert family_of(config, block_length=32).block_length == 32
