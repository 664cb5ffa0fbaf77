"""Images whose tokens attend both ways: which layers do, by the masks and hidden states of Gemma's own code."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin import PrefixTree, TreeLayout, TreeMask, UnsupportedError
from dta_plugin.attention.blocks import BlockRule
from dta_plugin.execution.packed import row_inputs
from dta_plugin.models import attention_registry, image_blocks
from dta_plugin.models.dispatch import install
from dta_plugin.models.image_blocks import block_rule, block_rules
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.layers import attention_modules, layer_types
from tests.support.blocks import with_blocks
from tests.support.models import norm_in_own_dtype
from tests.support.vision_models import vision_model

IMAGE, WINDOW = 90, 6
GEMMAS = ("gemma3", "gemma4")
_SAYS_IMAGES = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
# Images longer and shorter than the window, at the beginning and at the end, two in a row, and in one branch only.
ROWS = [
    [*[IMAGE] * 9, 3, 4, 5, 6, *[IMAGE] * 2, 7, 8, 9, 10, 11, *[IMAGE] * 12],
    [*[IMAGE] * 9, 3, 4, 5, 6, *[IMAGE] * 2, 7, 8, 12, *[IMAGE] * 4, 13],
    [*[IMAGE] * 9, 3, 4, 14, 15],
]


@cache
def gemma(family: str, attention: str = "eager") -> PreTrainedModel:
    model = vision_model(family, hidden_size_per_layer_input=0, sliding_window=WINDOW)
    norm_in_own_dtype(model)
    model.config.video_token_id, model.config.audio_token_id = 91, 92  # within the vocabulary
    model.set_attn_implementation(attention)
    return model


def blocks_of(tree: PrefixTree) -> PrefixTree:
    """The tree with the runs of image tokens as blocks."""
    is_image = np.concatenate([[False], tree.tokens == IMAGE, [False]])
    starts, stops = np.flatnonzero(is_image[1:] & ~is_image[:-1]), np.flatnonzero(is_image[:-1] & ~is_image[1:])
    return with_blocks(tree, *zip(starts.tolist(), stops.tolist(), strict=True))


def mask_of(sequences: list[list[int]]) -> TreeMask:
    return TreeMask.from_layout(TreeLayout.from_tree(blocks_of(PrefixTree.from_sequences(sequences))), "cpu")


def dense(model: PreTrainedModel, family: str, row: list[int], embeddings: torch.Tensor) -> torch.Tensor:
    """Hidden states [len, H] of one sequence by the model's own forward, which makes its masks itself."""
    says = torch.tensor([[int(token == IMAGE) for token in row]])
    inputs: dict[str, Any] = {"inputs_embeds": embeddings[None], _SAYS_IMAGES[family]: says, "use_cache": False}
    return decoder_of(model)(**inputs).last_hidden_state[0]


@pytest.mark.parametrize("family", GEMMAS)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_masks_are_those_of_the_models_own_code(family: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = gemma(family), {}
    modules = attention_modules(model)
    file = vars(sys.modules[type(modules[0]).__module__])
    behind = file["eager_attention_forward"]

    def record(module: nn.Module, query, key, value, attention_mask, **keywords):
        if module in modules.values():
            found[module.layer_idx] = (attention_mask[0, 0] == 0, keywords.get("sliding_window"))
        return behind(module, query, key, value, attention_mask, **keywords)

    monkeypatch.setitem(file, "eager_attention_forward", record)
    with torch.no_grad():
        dense(model, family, ROWS[row], torch.zeros(len(ROWS[row]), 32, dtype=torch.float64))
    assert found.keys() == modules.keys()
    mask = mask_of([ROWS[row]])
    for layer, (visible, window) in found.items():
        rule = block_rule(modules[layer])
        assert torch.equal(mask.ruled(rule).visible(window), visible), (layer, rule)
        others = {other for other in ("causal", "windowed", "whole") if other != rule and window is not None}
        assert all(not torch.equal(mask.ruled(other).visible(window), visible) for other in others)


RULES: dict[tuple[str, str], list[BlockRule]] = {
    ("5.10", "gemma3"): ["whole", "windowed", "whole"],
    ("5.10", "gemma4"): ["whole", "whole", "windowed"],
    ("5.24", "gemma3"): ["windowed", "windowed", "windowed"],
    ("5.24", "gemma4"): ["windowed", "windowed", "causal"],
}


@pytest.mark.parametrize("family", GEMMAS)
def test_what_the_table_says_of_releases(family: str) -> None:
    release = ".".join(version("transformers").split(".")[:2])
    if (release, family) not in RULES:
        pytest.skip("another release than those of the table")
    assert list(block_rules(gemma(family)).values()) == RULES[release, family]


def test_models_that_are_causal_on_images() -> None:
    small = vision_model("gemma4", use_bidirectional_attention=None)
    for model in (small, vision_model("qwen2_5_vl")):
        assert set(block_rules(model).values()) == {"causal"}


def test_models_whose_masks_do_not_tell() -> None:
    layer = attention_modules(vision_model("qwen2_5_vl"))[0]
    with pytest.raises(UnsupportedError, match="Qwen2_5_VLAttention with masks that do not tell which layers do"):
        block_rule(layer)


def test_the_masks_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, asked = [], image_blocks._masks
    monkeypatch.setattr(image_blocks, "_rules", {})
    monkeypatch.setattr(image_blocks, "_of_models", WeakKeyDictionary())
    monkeypatch.setattr(image_blocks, "_masks", lambda *a: calls.append(a) or asked(*a))
    config = gemma("gemma3").config.get_text_config()
    before = config.to_dict()
    for _ in range(3):
        block_rules(gemma("gemma3"))
    assert len(calls) == 1 and config.to_dict() == before and config._attn_implementation == "eager"


def tree_states(model: PreTrainedModel, tree: PrefixTree, embeddings: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, H] of the language model along a tree."""
    install(model)
    layout = TreeLayout.from_tree(tree)
    inputs = row_inputs(layout.input_ids, layout.depth, TreeMask.from_layout(layout, "cpu"))
    del inputs["input_ids"]
    text = decoder_of(model).get_decoder()
    return text(inputs_embeds=embeddings[None], **inputs).last_hidden_state[0]


def errors(family: str, tree: PrefixTree) -> tuple[float, float]:
    """Of the hidden states and of the embeddings' gradients, to each sequence alone."""
    model = gemma(family, "sdpa")  # whose softmax is in float64
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(tree.tree_tokens, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    states = tree_states(model, tree, embeddings)
    found, expected, error = states.new_zeros(()), states.new_zeros(()), 0.0
    for index, row in enumerate(ROWS):
        path = torch.from_numpy(tree.path(index))
        alone = dense(model, family, row, embeddings[path])
        weight = torch.randn(alone.shape, generator=generator, dtype=torch.float64)
        error = max(error, (alone - states[path]).abs().max().item())
        found, expected = found + (states[path] * weight).sum(), expected + (alone * weight).sum()
    of_tree, of_rows = (torch.autograd.grad(x, embeddings)[0] for x in (found, expected))
    return error, ((of_tree - of_rows).norm() / of_rows.norm()).item()


@pytest.mark.parametrize("family", GEMMAS)
def test_hidden_states_and_gradients_along_a_tree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = PrefixTree.from_sequences(ROWS)
    tree = blocks_of(causal)
    assert tree.tree_tokens < tree.flat_tokens - 20
    assert max(errors(family, tree)) < 1e-9
    assert min(errors(family, causal)) > 1e-2
    rules = block_rules(gemma(family)).items()
    has_window = [kind == "sliding_attention" for kind in layer_types(gemma(family).config.get_text_config())]
    for one in ("windowed", "whole", "causal"):
        monkeypatch.setattr(attention_registry, "block_rule", lambda _, one=one: one)
        is_right = all(rule == one or (not has_window[i] and "causal" not in (rule, one)) for i, rule in rules)
        assert (max(errors(family, tree)) < 1e-9) == is_right, one
