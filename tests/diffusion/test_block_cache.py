"""A cache changes nothing where attention is causal over blocks, and says so where it cannot be had."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dta_plugin.diffusion import SampledCompletions, SamplerConfig, block_cache, predictions, sample
from dta_plugin.diffusion.block_cache import ColumnCache, cached_predictions
from dta_plugin.errors import UnsupportedError
from tests.support.tiny_diffusion import FAMILY, VOCABULARY, diffusion_model, padded

PROMPTS, PROMPT_MASK = padded([[3, 4, 5, 6, 7, 8, 9, 10, 11], [8, 9], [10, 11, 12, 13], [5] * 7])
BLOCKS = dataclasses.replace(FAMILY, block_length=4, eos_token_ids=(2, 5, 7))
CONFIG = SamplerConfig(gen_length=24, block_length=4)


def sampled(model: Any, family: Any, config: SamplerConfig, cache: str) -> SampledCompletions:
    config = dataclasses.replace(config, kv_cache=cache)
    return sample(model, family, PROMPTS, PROMPT_MASK, config, torch.Generator().manual_seed(3))


def assert_same(found: SampledCompletions, expected: SampledCompletions) -> None:
    assert torch.equal(found.canvas_ids, expected.canvas_ids)
    assert torch.equal(found.steps, expected.steps)
    assert found.model_calls == expected.model_calls


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("model", "family", "config"),
    [
        ({}, {}, {}),
        ({"family": "llama", "attention": "eager"}, {}, {"temperature": 1.0}),
        ({}, {"is_shifted": True}, {"temperature": 1.0}),
        ({}, {"block_length": 1}, {"block_length": 1, "gen_length": 6}),
        ({}, {"block_length": 24}, {"block_length": 24}),
        ({}, {}, {"guidance_scale": 0.5, "temperature": 1.0}),
        ({}, {"eos_token_ids": ()}, {"remasking": "random", "steps": 24}),
        ({"initializer_range": 0.3}, {}, {"confidence_threshold": 0.2}),
    ],
    ids=["plain", "eager", "shifted", "causal", "one block", "guided", "random", "threshold"],
)
def test_blocks_are_sampled_as_without_a_cache(
    model: dict[str, Any], family: dict[str, Any], config: dict[str, Any], seed: int
) -> None:
    """Prompts of several lengths, so that blocks begin at other columns in every row; rows that end early."""
    net = diffusion_model(**({"dtype": torch.float64, "seed": seed} | model))
    own, settings = dataclasses.replace(BLOCKS, **family), dataclasses.replace(CONFIG, **config)
    whole = sampled(net, own, settings, "none")
    for cache in ("auto", "prefix", "dual"):
        assert_same(sampled(net, own, settings, cache), whole)


def test_later_calls_run_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns per call: 9 of prompts (1 in the first block) and blocks of 4; full attention: the suffix, or not."""
    runs: list[int] = []

    def watch(model, family, cache, ids, attention, columns, running):
        runs.append(running.stop - running.start)
        return cached_predictions(model, family, cache, ids, attention, columns, running)

    monkeypatch.setattr(block_cache, "cached_predictions", watch)
    model, config = diffusion_model(), dataclasses.replace(CONFIG, gen_length=12)
    family = dataclasses.replace(BLOCKS, eos_token_ids=())
    sample(model, family, PROMPTS[:1], None, config)
    assert runs == [12, 4, 8, 4, 8, 4, 5]  # the last block has one token, and the one before runs with it
    for cache, expected in (("prefix", [21, 12, 21, 8, 21, 4]), ("dual", [21, 4, 21, 4, 21, 4])):
        runs.clear()
        full = dataclasses.replace(family, block_length=None)
        sample(model, full, PROMPTS[:1], None, dataclasses.replace(config, kv_cache=cache))
        assert runs == expected


def test_a_cache_out_of_date_is_noticed() -> None:
    """Control: without the second run of a finished block the logits of the next one differ."""
    model, family = diffusion_model(dtype=torch.float64), dataclasses.replace(BLOCKS, eos_token_ids=())
    ids, real = torch.randint(3, 30, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    masked = ids.clone()
    masked[:, 4:8] = FAMILY.mask_token_id
    expected = predictions(model, family, ids, real, slice(8, 12))
    for first, is_right in ((ids, True), (masked, False)):
        cache = ColumnCache(16)
        cached_predictions(model, family, cache, first[:, :8], real[:, :8], slice(4, 8), slice(0, 8))
        found = cached_predictions(model, family, cache, ids, real, slice(8, 12), slice(8, 16))
        assert bool((found - expected).abs().max() < 1e-12) is is_right


def test_full_attention_is_exact_at_a_blocks_first_call_and_off_by_default() -> None:
    model = diffusion_model(dtype=torch.float64)
    whole = sampled(model, FAMILY, CONFIG, "none")
    assert_same(sampled(model, FAMILY, CONFIG, "auto"), whole)
    once = dataclasses.replace(CONFIG, steps=6)  # one call per block: nothing is reused
    for cache in ("prefix", "dual"):
        assert_same(sampled(model, FAMILY, once, cache), sampled(model, FAMILY, once, "none"))
        assert not torch.equal(sampled(model, FAMILY, CONFIG, cache).canvas_ids, whole.canvas_ids)


def test_with_adapters() -> None:
    model = get_peft_model(diffusion_model(dtype=torch.float64), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert_same(sampled(model, BLOCKS, CONFIG, "auto"), sampled(model, BLOCKS, CONFIG, "none"))


def test_a_cache_that_cannot_be_is_refused_and_auto_goes_without() -> None:
    model = diffusion_model(dtype=torch.float64).train()
    whole = sampled(model, BLOCKS, CONFIG, "none")
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="kv_cache='dual': gradient checkpointing is on"):
        sampled(model, BLOCKS, CONFIG, "dual")
    assert_same(sampled(model, BLOCKS, CONFIG, "auto"), whole)
    model.gradient_checkpointing_disable()

    own = model.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None, logits_to_keep=0: own(
        input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, use_cache=False, is_causal=False
    )
    with pytest.raises(UnsupportedError, match="takes no cache"):
        sampled(model, BLOCKS, CONFIG, "prefix")
    assert_same(sampled(model, BLOCKS, CONFIG, "auto"), whole)

    model.forward = lambda cache=None, **given: own(**given | {"use_cache": False})
    with pytest.raises(UnsupportedError, match="wrote nothing into it"):
        sampled(model, BLOCKS, CONFIG, "prefix")


def test_masks_of_ones_own_need_attention_that_takes_them() -> None:
    model = diffusion_model(attention="sdpa", vocab_size=VOCABULARY)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match=r"kv_cache='prefix'.*attn_implementation='sdpa'"):
        sampled(model, FAMILY, CONFIG, "prefix")
