"""`share_prefixes`: models called with padded batches equal themselves without it, outputs, losses and gradients.

The oracle is the same Hugging Face model on the same padded batch, never touched by the package.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, ModernBertConfig, PreTrainedModel

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig, UnsupportedModelError, share_prefixes
from dta_plugin.execution import padded
from dta_plugin.execution.padded import PaddedBatch, spread
from tests.support.models import FAMILIES, norm_in_own_dtype, softmax_in_own_dtype, tiny_config, tiny_model
from tests.support.oracle import GRADIENT_FLOOR, gradients
from tests.support.tree_run import TOLERANCE, make_siblings_visible
from tests.support.trees import SHAPES, Sequences, branching_comb, forest, run, sequence_batches, star

Inputs = dict[str, torch.Tensor]
BATCHES = {name: sequences for name, sequences in SHAPES.items() if len(sequences) > 1}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def padded_batch(sequences: Sequences, side: str = "right") -> Inputs:
    """Rows, mask and labels as a collator makes them; with left padding, the first token has no label."""
    length = max(map(len, sequences)) + 2
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outcome(model: torch.nn.Module, inputs: Inputs, **options: Any) -> dict[str, torch.Tensor]:
    """Logits at real tokens (or of rows), loss, and the gradient of loss and random sums of logits, by name."""
    output = model(**inputs, use_cache=False, **options)
    logits = output.logits[inputs["attention_mask"].bool()] if output.logits.ndim == 3 else output.logits
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = (noise.to(logits.dtype) * logits).sum()
    if output.loss is not None and output.loss.isfinite():
        loss = loss + output.loss
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients(model, loss)


def apart(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest L2 difference, relative; of a small gradient, relative to a share of the largest one."""
    assert actual.keys() == expected.keys()
    largest = max(value.double().norm().item() for name, value in expected.items() if name not in ("logits", "loss"))
    floors = {"logits": 0.0, "loss": 0.0}
    return max(
        (
            (actual[name].double() - value.double()).norm()
            / max(value.double().norm().item(), floors.get(name, GRADIENT_FLOOR * largest), 1e-30)
        ).item()
        for name, value in expected.items()
    )


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
        return get_peft_model(model, options).to(model.dtype)


def classifier(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=1, **changes))
    norm_in_own_dtype(model)
    return model.to(dtype).eval()


@DTYPES
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_shape(name: str, side: str, dtype: torch.dtype) -> None:
    inputs = padded_batch(BATCHES[name], side)
    model = tiny_model("qwen3", dtype)
    expected = outcome(model, inputs)
    with share_prefixes(model) as sharing:
        actual = outcome(model, inputs)
    assert apart(actual, expected) <= TOLERANCE[dtype]
    assert sharing.report is not None and sharing.tree_tokens == sharing.report.tree_tokens
    assert (sharing.tree_tokens < sharing.flat_tokens) == (name not in ("nothing_shared", "one_token_trees"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, side: str) -> None:
    inputs = padded_batch(branching_comb(4) + forest(), side)
    model = tiny_model(family, torch.float64)
    expected = outcome(model, inputs)
    with share_prefixes(model):
        actual = outcome(model, inputs)
    # Left padding moves rotary positions of the dense path, whose angles transformers takes in float32.
    assert apart(actual, expected) <= (1e-10 if side == "right" else 1e-5)


@settings(max_examples=60)
@given(sequence_batches(), st.sampled_from(["right", "left"]))
def test_random_trees(sequences: Sequences, side: str) -> None:
    inputs = padded_batch([*sequences, sequences[0]], side)
    model = tiny_model("llama", torch.float64)
    expected = outcome(model, inputs)
    with share_prefixes(model):
        assert apart(outcome(model, inputs), expected) <= 1e-5
