"""Rows that share blocks have the log-probs and gradients of rows alone, through the plain model and a mask by hand."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from dta_plugin.diffusion import DiffusionFamily, draw_masks, prompt_sharing
from dta_plugin.diffusion.objectives.elbo import masked_log_probs, sample_term
from dta_plugin.diffusion.objectives.trajectory import step_log_probs
from dta_plugin.diffusion.prompt_sharing import PromptSharing, block_tree
from dta_plugin.diffusion.steps import draw_steps
from tests.support.saved import SavedBytes
from tests.support.tiny_diffusion import FAMILY, MASK, diffusion_model, padded

CANVAS = 6
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def blocked(length: int, is_shifted: bool = False) -> DiffusionFamily:
    return dataclasses.replace(FAMILY, block_length=length, is_shifted=is_shifted)


def groups(prompt_lengths: tuple[int, ...] = (11, 7), siblings: int = 3) -> Rows:
    """ids [B, S], attention mask, and what is hidden [B, C]: groups of siblings, one shorter, and a row twice."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, MASK, (count,), generator=generator).tolist()

    rows = []
    for length in prompt_lengths:
        prompt = tokens(length)
        rows += [prompt + tokens(CANVAS) for _ in range(siblings)]
    ids, attention = padded([*rows, rows[0]])
    attention[1, -2:] = 0
    hidden = (torch.rand(len(ids), CANVAS, generator=generator) < 0.5) & attention[:, -CANVAS:].bool()
    hidden[-1] = hidden[0]
    return ids, attention, hidden


def alone(model: torch.nn.Module, family: DiffusionFamily, rows: Rows) -> torch.Tensor:
    """Log-probs [B, C] row by row, without padding: full logits of the plain model under a mask that is written out."""
    ids, attention, hidden = rows
    values = torch.zeros(hidden.shape, dtype=torch.float64)
    for row, (own, real, mask) in enumerate(zip(ids, attention.bool(), hidden, strict=True)):
        seen = own.clone()
        seen[-CANVAS:][mask] = MASK
        count = int(real.sum())
        block = torch.arange(count) // family.block_length
        visible = (block[None, :] <= block[:, None])[None, None]
        logits = model(input_ids=seen[real][None], attention_mask=visible, use_cache=False).logits[0]
        position = real.cumsum(0)[-CANVAS:][mask] - 1
        scores = logits[position - int(family.is_shifted)].log_softmax(-1).gather(1, own[-CANVAS:][mask][:, None])[:, 0]
        values = values.index_put((torch.full_like(position, row), mask.nonzero()[:, 0]), scores.double())
    return values


def gradients(model: torch.nn.Module, values: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=values.dtype)
    model.zero_grad()
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def shared(model: torch.nn.Module, family: DiffusionFamily, rows: Rows) -> tuple[torch.Tensor, PromptSharing]:
    sharing = PromptSharing()
    return masked_log_probs(model, family, *rows, sharing=sharing), sharing


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_log_probs_and_gradients_are_those_of_rows_alone(name: str, block_length: int, is_shifted: bool) -> None:
    model, family, rows = diffusion_model(name, dtype=torch.float64), blocked(block_length, is_shifted), groups()
    found, sharing = shared(model, family, rows)
    expected = alone(model, family, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1
    assert largest_difference(gradients(model, found), gradients(model, expected)) < 1e-10
    assert sharing.tree_tokens < sharing.flat_tokens == int(rows[1].sum())


def test_eager_attention() -> None:
    """Whose softmax is float32, whatever the model."""
    model, rows = diffusion_model(dtype=torch.float64, attention="eager"), groups()
    found, sharing = shared(model, blocked(4), rows)
    torch.testing.assert_close(found, masked_log_probs(model, blocked(4), *rows), rtol=0, atol=1e-5)
    assert sharing.tree_tokens < sharing.flat_tokens


@pytest.mark.parametrize("fault", ["blocks are causal inside", "rows part within blocks"])
def test_a_tree_that_does_not_keep_to_blocks_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls."""

    def faulty(rows: list[np.ndarray], block_length: int) -> prompt_sharing.PrefixTree:
        if fault == "blocks are causal inside":
            return dataclasses.replace(block_tree(rows, block_length), reach=None)
        tree = prompt_sharing.PrefixTree.from_sequences(rows)
        left = (tree.depth // block_length + 1) * block_length - tree.depth
        node_end = np.repeat(tree.node_start[1:], np.diff(tree.node_start))
        return dataclasses.replace(tree, reach=np.minimum(np.arange(tree.tree_tokens) + left, node_end))

    model, rows = diffusion_model(dtype=torch.float64), groups()
    expected = alone(model, blocked(4), rows)
    monkeypatch.setattr(prompt_sharing, "block_tree", faulty)
    found, _ = shared(model, blocked(4), rows)
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("prompt_length", [12, 14])
@pytest.mark.parametrize("siblings", [2, 5])
def test_finished_blocks_of_a_prompt_run_once(prompt_length: int, siblings: int) -> None:
    """P + G C tokens in the place of G (P + C); the prompt's last, unfinished block is part of each branch."""
    model, (ids, _, _) = diffusion_model(dtype=torch.float64), groups((prompt_length,), siblings)
    ids = ids[:siblings]
    ids[:, prompt_length] = torch.arange(3, 3 + siblings)  # rows differ in their first token, which is seen
    hidden = (torch.arange(CANVAS) > 0).expand(siblings, -1)
    rows = ids, torch.ones_like(ids), hidden
    expected = masked_log_probs(model, blocked(4), *rows)
    run: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: run.append(inputs[0].numel()))
    found, sharing = shared(model, blocked(4), rows)
    found.sum().backward()
    begun = prompt_length % 4
    assert run == [prompt_length - begun + siblings * (begun + CANVAS)] == [sharing.tree_tokens]
    masked_log_probs(model, blocked(4), *rows)
    assert run[1:] == [siblings * (prompt_length + CANVAS)] == [sharing.flat_tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_blocks_of_a_completion_that_are_alike_run_once_too() -> None:
    rows = [np.array(row) for row in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3, 4])]
    tree = block_tree(rows, 2)
    assert tree.tokens.tolist() == [1, 2, 3, 3, 4, 5, 6, 7]
    assert tree.reach is not None and tree.reach.tolist() == [2, 2, 3, 5, 5, 7, 7, 8]
    for row, tokens in enumerate(rows):
        assert tree.tokens[tree.path(row)].tolist() == tokens.tolist()


@pytest.mark.parametrize(("kind", "family"), [("auto", FAMILY), ("never", blocked(4))], ids=["full", "never"])
def test_off(kind: str, family: DiffusionFamily) -> None:
    model, rows, sharing = diffusion_model(dtype=torch.float64), groups(), PromptSharing(kind)
    found = masked_log_probs(model, family, *rows, sharing=sharing)
    assert torch.equal(found, masked_log_probs(model, family, *rows))
    assert sharing.counts(family) == {} and sharing.flat_tokens == 0


def test_with_full_attention_a_prompt_depends_on_its_completion() -> None:
    """Why nothing is shared there: negative control of the equality above."""
    model, (ids, attention, hidden) = diffusion_model(dtype=torch.float64), groups((12,), 2)
    states = [model.model(input_ids=row[None], is_causal=False).last_hidden_state[0, :12] for row in ids[:2]]
    assert (states[0] - states[1]).abs().max() > 1e-3
    pair = blocked(4), (ids[:2], attention[:2], hidden[:2])
    whole = masked_log_probs(model, FAMILY, *pair[1])
    assert (shared(model, *pair)[0] - whole).abs().max() > 1e-3


def test_rows_without_a_block_in_common_run_side_by_side() -> None:
    model, (ids, attention, hidden) = diffusion_model(dtype=torch.float64), groups((11, 7, 9), 1)
    rows = ids[:3], attention[:3], hidden[:3]
    found, sharing = shared(model, blocked(4), rows)
    assert torch.equal(found, masked_log_probs(model, blocked(4), *rows))
    assert sharing.tree_tokens == sharing.flat_tokens == int(attention[:3].sum())


def test_states_of_padding_are_those_of_rows_side_by_side() -> None:
    """A shifted family reads the first token of a row without a prompt from what stands before it."""
    model, (ids, attention, hidden) = diffusion_model(dtype=torch.float64), groups()
    attention[2, :-CANVAS] = 0
    hidden[2, 0] = True
    family = blocked(4, is_shifted=True)
    found, _ = shared(model, family, (ids, attention, hidden))
    assert torch.equal(found, masked_log_probs(model, family, ids, attention, hidden))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_lora(use_reentrant: bool) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(diffusion_model(dtype=torch.float64), lora).double()
    rows = groups()
    expected = gradients(model, masked_log_probs(model, blocked(4), *rows))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    found, sharing = shared(model, blocked(4), rows)
    assert sharing.tree_tokens < sharing.flat_tokens
    assert largest_difference(gradients(model, found), expected) < 1e-10
    assert all("lora" in name for name in expected)


def test_dropout_of_attention_is_said_once_and_nothing_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    model, rows, sharing = diffusion_model(attention_dropout=0.5).train(), groups(), PromptSharing()
    with caplog.at_level(logging.WARNING, "dta_plugin"):
        for _ in range(2):
            masked_log_probs(model, blocked(4), *rows, sharing=sharing)
    assert len(caplog.records) == 1 and "attention_dropout is 0.5" in caplog.text
    assert sharing.flat_tokens == 0


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_steps_of_a_trajectory_on_the_canvas_that_the_sampler_saw(sample: int) -> None:
    model, (ids, attention, _) = diffusion_model(dtype=torch.float64), groups()
    attention[:, -CANVAS:] = 1
    every = torch.arange(len(ids))
    steps = torch.arange(CANVAS).flip(0).expand(len(ids), -1) // 2
    ids[2, -2:], steps[2, -2:] = MASK, -1  # blocks that never ran
    draws = draw_steps(steps, torch.full((len(ids),), CANVAS), 3, every)
    sharing = PromptSharing()
    call = (model, blocked(4), ids, attention, draws, sample, every)
    found, expected = step_log_probs(*call, sharing), step_log_probs(*call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert largest_difference(gradients(model, found), gradients(model, expected)) < 1e-10
    assert sharing.tree_tokens < sharing.flat_tokens


def peak_bytes(model: PreTrainedModel, samples: int, sharing: PromptSharing | None) -> int:
    """Most bytes saved for backward passes, one pass per sample, of four siblings with a prompt of 64."""
    ids, attention, _ = groups((64,), 4)
    draws = draw_masks(attention[:4, -CANVAS:].sum(dim=1), samples, torch.arange(4))
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        for sample in range(samples):
            term = sample_term(model, blocked(4), ids[:4], attention[:4], draws, sample, CANVAS, None, sharing)
            term.sum().backward()
    gc.collect()
    return saved.peak


def test_memory_is_that_of_one_sample_and_of_one_prompt() -> None:
    model = diffusion_model()
    one, many = (peak_bytes(copy.deepcopy(model), samples, PromptSharing()) for samples in (1, 8))
    apart = peak_bytes(copy.deepcopy(model), 1, None)
    assert abs(many / one - 1) < 0.05
    assert one < 0.5 * apart  # 64 + 4 * 6 tokens in the place of 4 * (64 + 6)
