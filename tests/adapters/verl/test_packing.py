"""Packed rows that see each other in stock verl: a tree is what padded rows give, and verl's own path says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import SIZES, Setup, Step, build, difference, train

TOLERANCE = 1e-5
SEE_EACH_OTHER = "packed rows of GptOssForCausalLM see each other"
PACKED, PADDED = Step(), Step(remove_padding=False)
ELSEWHERE = TreeConfig(min_saving=0.99)


@pytest.fixture(scope="module")
def gpt_oss(rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny and random, sinks and biases too. It has no sdpa: attention is transformers' own, with masks."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("gpt_oss")
    model.save_pretrained(folder)
    return folder


def test_masks_without_positions(gpt_oss: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(model={"override_config": {"attn_implementation": "eager"}})
    mixed, expected = (train(build(setup, gpt_oss, tree=False), [step])[0] for step in (PACKED, PADDED))
    assert difference(mixed, expected) > 100 * TOLERANCE
    engine = build(setup, gpt_oss, tree=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        assert difference(train(engine, [PACKED])[0], expected) < TOLERANCE
        assert "see each other" not in caplog.text
        train(engine, [replace(PADDED, config=ELSEWHERE)])
        assert "see each other" not in caplog.text
        train(engine, [replace(PACKED, config=ELSEWHERE)])
    assert caplog.text.count(SEE_EACH_OTHER) == 1
    assert not hasattr(modeling_gpt_oss.create_causal_mask, "__wrapped__")  # the function that makes masks is back


def test_masks_that_know_positions_are_not_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dta_plugin"):
        train(build(Setup(), folder, tree=True), [Step(config=ELSEWHERE)])
    assert "verl's own path: only" in caplog.text and "see each other" not in caplog.text
