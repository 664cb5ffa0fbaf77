"""What the trajectory objective estimates: the log-likelihood of what the sampler committed, given its steps."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import pytest
import torch
from transformers import PreTrainedModel

from dta_plugin.diffusion import SampledCompletions, SamplerConfig, sample
from dta_plugin.diffusion.block_cache import BlockReader
from dta_plugin.diffusion.objectives.trajectory import step_log_probs
from dta_plugin.diffusion.steps import StepDraws, draw_steps
from tests.support.saved import SavedBytes
from tests.support.tiny_diffusion import FAMILY, MASK, diffusion_model, padded

PROMPTS, PROMPT_MASK = padded([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]])
ALL = torch.arange(3)
EARLY = dataclasses.replace(FAMILY, eos_token_ids=tuple(range(2, 11)))  # rows end early, and within blocks
CASES = {
    "a token per step": (EARLY, SamplerConfig(gen_length=9, block_length=3, steps=9, temperature=1.0)),
    "random": (EARLY, SamplerConfig(gen_length=12, block_length=6, steps=6, temperature=1.0, remasking="random")),
    "several tokens": (FAMILY, SamplerConfig(gen_length=10, block_length=5, steps=4, temperature=1.0)),
    "a threshold": (
        EARLY,
        SamplerConfig(gen_length=10, block_length=5, confidence_threshold=0.05, temperature=1.0),
    ),
    "block attention": (
        dataclasses.replace(EARLY, block_length=4),
        SamplerConfig(gen_length=12, block_length=4, steps=6, temperature=1.0),
    ),
}


def rollout(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, SampledCompletions, torch.Tensor, list[torch.Tensor]]:
    """-> model, completions, log-probs [3, C] of committed tokens when they were committed, canvases before each step.

    Rows that do not run any more have none; shorter canvases are filled with masks.
    """
    family, config = CASES[case]
    model = diffusion_model(dtype=torch.float64)
    calls: list[tuple[torch.Tensor, torch.Tensor, slice]] = []

    own = BlockReader.logits

    def watch(reader: BlockReader, ids: torch.Tensor, attention: torch.Tensor, columns: slice) -> torch.Tensor:
        logits = own(reader, ids, attention, columns)
        calls.append((ids.clone(), logits.log_softmax(dim=-1), columns))
        return logits

    monkeypatch.setattr(BlockReader, "logits", watch)
    result = sample(model, family, PROMPTS, PROMPT_MASK, config, torch.Generator().manual_seed(1))
    committed = torch.zeros(3, config.gen_length, dtype=torch.float64)
    for step, (ids, log_probs, columns) in enumerate(calls):
        for row, column in (result.steps == step).nonzero().tolist():
            at = next(i for i, own in enumerate(ids) if torch.equal(own[:5], PROMPTS[row]))
            token = result.canvas_ids[row, column]
            committed[row, column] = log_probs[at, 5 + column - columns.start, token]
    width = config.gen_length
    canvases = [torch.nn.functional.pad(ids[:, 5:], (0, width - ids.shape[1] + 5), value=MASK) for ids, _, _ in calls]
    return model, result, committed, canvases


def inputs(result: SampledCompletions) -> tuple[torch.Tensor, torch.Tensor]:
    canvas = result.canvas_ids
    return torch.cat([PROMPTS, canvas], dim=1), torch.cat([PROMPT_MASK, torch.ones_like(canvas)], dim=1)


def every_step(result: SampledCompletions) -> StepDraws:
    """Row by row, its steps in order."""
    draws = draw_steps(result.steps, result.lengths, int(result.steps.max()) + 1, ALL)
    order = torch.where(draws.chosen < 0, 1000, draws.chosen).sort(dim=1).values
    return dataclasses.replace(draws, chosen=torch.where(order == 1000, -1, order))


@pytest.mark.parametrize("case", CASES)
def test_the_record_rebuilds_what_every_step_saw(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, result, _, canvases = rollout(case, monkeypatch)
    assert result.model_calls == len(canvases)
    assert torch.equal(result.steps < 0, result.canvas_ids == MASK)
    for row, length in enumerate(result.lengths.tolist()):
        assert torch.equal(result.canvas_ids[row, :length], result.completion_ids[row, :length])
    for step, seen in enumerate(canvases):
        running = (result.steps >= step).any(dim=1)  # of rows that are done only those that others wait for run
        before = result.canvas_ids.masked_fill((result.steps < 0) | (result.steps >= step), MASK)
        assert all(any(torch.equal(own, other) for other in seen) for own in before[running])


@pytest.mark.parametrize("case", CASES)
def test_steps_have_the_log_probs_of_the_rollout(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, committed, _ = rollout(case, monkeypatch)
    ids, mask = inputs(result)
    draws = every_step(result)
    with torch.no_grad():
        found = torch.stack(
            [step_log_probs(model, CASES[case][0], ids, mask, draws, j, ALL) for j in range(draws.samples)], 1
        )
    counts = torch.arange(result.steps.shape[1]) < result.lengths[:, None]
    expected = torch.zeros_like(found)
    for row, step in (draws.chosen >= 0).nonzero().tolist():
        expected[row, step] = committed[row][counts[row] & (result.steps[row] == draws.chosen[row, step])].sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), (committed * counts).sum(dim=1), rtol=0, atol=1e-6)
    assert expected.abs().max() > 1.0


def test_behind_the_end_the_canvas_is_what_the_sampler_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with end tokens in the place of the canvas log-probs are others."""
    model, result, committed, _ = rollout("a token per step", monkeypatch)
    assert (result.canvas_ids != result.completion_ids).any()
    draws, (ids, mask) = every_step(result), inputs(result)
    ids = torch.cat([ids[:, :5], result.completion_ids], dim=1)
    filled = dataclasses.replace(draws, steps=result.steps.clamp(min=0))
    with torch.no_grad():
        found = sum(step_log_probs(model, EARLY, ids, mask, filled, j, ALL) for j in range(draws.samples))
    counts = torch.arange(result.steps.shape[1]) < result.lengths[:, None]
    assert (found - (committed * counts).sum(dim=1)).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_the_mean_over_all_draws_is_the_log_likelihood(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, by enumeration of every ordered draw without replacement of a row of four steps."""
    model, result, committed, _ = rollout("several tokens", monkeypatch)
    ids, mask = inputs(result)
    row, length = torch.tensor([0]), int(result.lengths[0])
    assert length == 10
    drawn = draw_steps(result.steps, result.lengths, samples, ALL)
    truth, estimates = committed[0, :length].sum(), []
    for order in itertools.permutations(range(4), min(samples, 4)):
        chosen = torch.tensor([*order, *[-1] * (samples - len(order))])
        draws = dataclasses.replace(drawn, chosen=chosen[None].expand(3, -1))
        terms = [step_log_probs(model, FAMILY, ids, mask, draws, j, row) * drawn.weights[0, j] for j in range(samples)]
        estimates.append(torch.cat(terms).mean())
    mean = torch.stack(estimates).mean()
    torch.testing.assert_close(mean.detach(), truth, rtol=0, atol=1e-6)
    every = every_step(result)
    whole = sum(step_log_probs(model, FAMILY, ids, mask, every, j, row).sum() for j in range(4))
    weight = model.get_output_embeddings().weight
    gradients = [torch.autograd.grad(value, weight)[0] for value in (mean, whole)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6 * float(gradients[1].abs().max()))
    if samples < 4:  # control: one draw is only an estimate
        assert (estimates[0] - truth).abs() > 1e-2


def test_another_order_of_writing_has_another_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: steps in reverse, tokens as they are."""
    model, result, committed, _ = rollout("several tokens", monkeypatch)
    backwards = dataclasses.replace(result, steps=3 - result.steps)
    draws, (ids, mask) = every_step(backwards), inputs(result)
    with torch.no_grad():
        found = sum(step_log_probs(model, FAMILY, ids, mask, draws, j, ALL) for j in range(4))
    counts = torch.arange(10) < result.lengths[:, None]
    assert (found - (committed * counts).sum(dim=1)).abs().min() > 1e-2


def peak_bytes(samples: int, is_loop: bool) -> int:
    model = diffusion_model()
    config = SamplerConfig(gen_length=32, block_length=32, steps=32, temperature=1.0)
    prompts = torch.randint(3, MASK, (4, 5), generator=torch.Generator().manual_seed(0))
    endless = dataclasses.replace(FAMILY, eos_token_ids=())
    result = sample(model, endless, prompts, None, config, torch.Generator().manual_seed(0))
    ids = torch.cat([prompts, result.canvas_ids], dim=1)
    draws = draw_steps(result.steps, result.lengths, samples, torch.arange(4))
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        terms = (
            step_log_probs(model, endless, ids, torch.ones_like(ids), draws, j, torch.arange(4)).sum()
            for j in range(samples)
        )
        if is_loop:
            for term in terms:
                term.backward()
        else:
            sum(terms).backward()
    gc.collect()
    return saved.peak


def test_the_loop_needs_the_memory_of_one_step_and_one_graph_that_of_all() -> None:
    loop = {n: peak_bytes(n, True) for n in (1, 4, 32)}
    graph = {n: peak_bytes(n, False) for n in (1, 4)}
    assert all(abs(loop[n] / loop[1] - 1) < 0.05 for n in loop)
    assert abs(graph[4] / (4 * loop[1]) - 1) < 0.05
