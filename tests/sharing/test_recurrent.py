"""`share_prefixes` on models with recurrent layers, against the same models on the same padded batches.

A model of transformers sets the hidden states of padding to 0 in front of its recurrent layers. In front of a row that
leaves their states as they begin, behind it nothing is read: a row has the values that it has alone, as in a tree.
Without a mask, padding is tokens as all others, in either.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel

from dta_plugin import share_prefixes
from tests.sharing.test_share_prefixes import Inputs, apart, outcome, padded_batch
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import carry_states_across_branches

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.15"), reason="mixers ask caches otherwise"
)

# Delta rule, convolution, Mamba 2 and Mamba without any attention; with attention.
FAMILIES = ["qwen3_5_text", "lfm2", "mamba2", "mamba"]
MORE = ["qwen3_next", "olmo_hybrid", "kimi_linear", "nemotron_h", "bamba", "falcon_h1", "granitemoehybrid", "jamba"]
# Of a gradient, or of a hundredth of the largest one. In float32, stock is 1e-5 from itself in float64 (Jamba), and
# from itself with padding on the other side (Qwen3.5).
TOLERANCE = 3e-5


def built(family: str) -> PreTrainedModel:
    """Epsilons so large that norms of what is read from a state, which may be nearly 0, do not amplify rounding."""
    config = config_of(family)
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if hasattr(config, name):
            setattr(config, name, 1e-2)
    return random_causal_lm(config)


def batch(side: str = "right") -> Inputs:
    inputs = padded_batch(forest(), side)
    inputs.pop("position_ids", None)  # some of these models have none
    return inputs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_equal_to_stock(family: str, side: str) -> None:
    model, inputs = built(family), batch(side)
    expected = outcome(model, inputs)
    alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].detach() for row in forest()]
    torch.testing.assert_close(expected["logits"], torch.cat(alone), rtol=1e-4, atol=1e-4)
    with share_prefixes(model) as sharing:
        assert apart(outcome(model, inputs), expected) <= TOLERANCE
    assert sharing.shared_calls == 1 and sharing.tree_tokens < sharing.flat_tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_a_mask_padding_is_tokens(side: str) -> None:
    model, ids = built("qwen3_5_text"), batch(side)["input_ids"]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, unmasked = outcome(model, whole), model(ids, use_cache=False).logits
    with share_prefixes(model) as sharing:
        assert apart(outcome(model, whole), expected) <= TOLERANCE
        torch.testing.assert_close(model(ids, use_cache=False).logits, unmasked, rtol=1e-4, atol=1e-4)
    assert sharing.shared_calls == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    inputs = batch("left")
    expected, model = outcome(built("qwen3_5_text"), inputs), built("qwen3_5_text")
    share_prefixes(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert apart(outcome(model, inputs), expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_untouched(family: str) -> None:
    inputs, model = batch("left"), built(family).eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    expected = model.generate(inputs["input_ids"], **options)
    with share_prefixes(model) as sharing:
        model(**inputs, use_cache=False)
        assert torch.equal(model.generate(inputs["input_ids"], **options), expected)
    assert sharing.calls == 6 and sharing.shared_calls == 1


@pytest.mark.usefixtures("unprobed")
def test_negative_control_states_of_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built("mamba"), batch()
    expected = outcome(model, inputs)
    share_prefixes(model)
    carry_states_across_branches(monkeypatch)
    assert apart(outcome(model, inputs), expected) > 1e-2
