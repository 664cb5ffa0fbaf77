"""What recurrent layers keep for the backward pass: within a budget where a tree is streamed, and as estimated."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig
from dta_plugin.execution import memory
from tests.execution.streaming.test_streamed import peak_of, sessions, stream
from tests.support.models import VOCABULARY
from tests.support.tiny_families import config_of, random_causal_lm

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.15"), reason="mixers ask caches otherwise"
)
PACKED = TreeConfig(executor="packed")


def built(family: str) -> PreTrainedModel:
    return random_causal_lm(config_of(family, vocab_size=VOCABULARY))


@pytest.mark.usefixtures("unprobed")
def test_memory_does_not_grow_with_the_tree() -> None:
    """From 2k to 7k tokens: what is saved grows with the tree only where it runs packed."""
    small, large = (peak_of(sessions(count), stream(512), built("qwen3_5_text")) for count in (1, 4))
    assert large < 1.1 * small
    assert peak_of(sessions(2), PACKED, built("qwen3_5_text")) > 4 * small


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "bamba", "mamba"])
def test_bytes_per_token_are_about_what_a_forward_pass_saves(family: str) -> None:
    model = built(family)
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = list(range(3, 259))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = dta_plugin.sequence_logprobs(model, [tokens], PACKED)
    assert out.report.executor == "packed"
    saved = sum(size for pointer, size in seen.items() if pointer not in weights) / len(tokens)
    assert 0.5 < memory.bytes_per_token(model) / saved < 2
