"""The sampler commits what it should, when it should, and never takes it back."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dta_plugin.diffusion import SamplerConfig, block_cache, commits, predictions, sample
from dta_plugin.diffusion.sampler_config import default_block_length
from dta_plugin.errors import InvalidInputError
from tests.support.tiny_diffusion import EOS, FAMILY, MASK, SHIFTED, VOCABULARY, diffusion_model, padded, shifted_twin

ENDLESS = dataclasses.replace(FAMILY, eos_token_ids=())
PROMPTS, PROMPT_MASK = padded([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]])
SMALL = SamplerConfig(gen_length=12, block_length=4, steps=6)


def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The canvases that the model is shown, in order."""
    seen: list[torch.Tensor] = []

    def watch(model, family, ids, attention, columns):
        seen.append(ids.clone())
        return predictions(model, family, ids, attention, columns)

    monkeypatch.setattr(block_cache, "predictions", watch)
    return seen


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_committed_block_by_block_and_never_change(
    remasking: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = traced(monkeypatch)
    config = dataclasses.replace(SMALL, remasking=remasking, temperature=temperature)
    result = sample(diffusion_model(), ENDLESS, PROMPTS, PROMPT_MASK, config, seeded())
    states = [ids[:, 5:] for ids in seen] + [result.completion_ids]
    assert result.model_calls == len(seen) == 6
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        written = before != MASK
        assert torch.equal(before[written], after[written])
        assert ((before != after).sum(dim=1) == 2).all()
        block = slice(4 * (step // 2), 4 * (step // 2) + 4)
        outside = torch.ones(12, dtype=torch.bool)
        outside[block] = False
        assert torch.equal(before[:, outside], after[:, outside])
    assert all(torch.equal(ids[:, :5], PROMPTS) for ids in seen)
    assert (result.completion_ids != MASK).all()
    assert result.lengths.tolist() == [12] * 3


def test_the_remainder_of_a_block_is_committed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    config = SamplerConfig(gen_length=10, block_length=5, steps=6)
    result = sample(diffusion_model(), ENDLESS, PROMPTS, PROMPT_MASK, config)
    left = [int((ids[0] == MASK).sum()) for ids in seen] + [int((result.completion_ids[0] == MASK).sum())]
    assert left == [10, 8, 6, 5, 3, 1, 0]


def test_the_most_confident_proposals_are_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    model = diffusion_model()
    sample(model, ENDLESS, PROMPTS, PROMPT_MASK, SMALL)
    attention = torch.nn.functional.pad(PROMPT_MASK, (0, 12), value=1)
    probability = predictions(model, ENDLESS, seen[0], attention, slice(5, 9))
    probability[..., MASK] = float("-inf")
    best, token = probability.softmax(dim=-1).max(dim=-1)
    for row in range(3):
        top = set(best[row].topk(2).indices.tolist())
        written = set((seen[1][row, 5:9] != MASK).nonzero()[:, 0].tolist())
        assert written == top
        assert all(seen[1][row, 5 + c] == token[row, c] for c in top)


def test_zero_temperature_is_deterministic_and_noise_follows_the_generator() -> None:
    model = diffusion_model()
    cold = [sample(model, FAMILY, PROMPTS, PROMPT_MASK, SMALL, seeded(s)).completion_ids for s in (0, 1)]
    assert torch.equal(*cold)
    warm = dataclasses.replace(SMALL, temperature=1.0)
    same = [sample(model, FAMILY, PROMPTS, PROMPT_MASK, warm, seeded(3)).completion_ids for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], sample(model, FAMILY, PROMPTS, PROMPT_MASK, warm, seeded(4)).completion_ids)


def test_proposals_follow_the_softmax_of_the_temperature() -> None:
    logits, draws = torch.tensor([0.3, -1.0, 1.2, 0.0]), 40000
    tokens = commits._proposals(logits.expand(draws, 4), 0.7, seeded())
    share = torch.bincount(tokens, minlength=4) / draws
    assert (share - (logits / 0.7).softmax(dim=0)).abs().max() < 0.01
    assert (share - logits.softmax(dim=0)).abs().max() > 0.02  # control: another temperature


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_row_does_not_depend_on_padding_and_neighbours(block_length: int | None) -> None:
    model, family = diffusion_model(), dataclasses.replace(FAMILY, block_length=block_length)
    together = sample(model, family, PROMPTS, PROMPT_MASK, SMALL)
    for row, prompt in enumerate([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]):
        alone = sample(model, family, torch.tensor([prompt]), None, SMALL)
        assert torch.equal(together.completion_ids[row], alone.completion_ids[0])
        assert together.lengths[row] == alone.lengths[0]


def test_a_shifted_twin_samples_the_same() -> None:
    plain = sample(diffusion_model(), FAMILY, PROMPTS, PROMPT_MASK, SMALL)
    shifted = sample(shifted_twin(diffusion_model()), SHIFTED, PROMPTS, PROMPT_MASK, SMALL)
    assert torch.equal(plain.completion_ids, shifted.completion_ids)


def test_mask_and_forbidden_tokens_are_never_chosen() -> None:
    model = diffusion_model()
    warm = dataclasses.replace(SMALL, temperature=5.0)
    seen = set(sample(model, ENDLESS, PROMPTS.repeat(40, 1), None, warm, seeded()).completion_ids.flatten().tolist())
    assert seen == set(range(VOCABULARY)) - {MASK}
    strict = dataclasses.replace(ENDLESS, forbidden_token_ids=(4, 9))
    seen = set(sample(model, strict, PROMPTS.repeat(40, 1), None, warm, seeded()).completion_ids.flatten().tolist())
    assert seen == set(range(VOCABULARY)) - {MASK, 4, 9}


def one_token_model(tokens: dict[int, int], default: int):
    """A model that predicts `default`, or another token at some columns of the canvas."""
    model = diffusion_model(tie_word_embeddings=False)
    predicted = torch.full((64,), default)
    for column, token in tokens.items():
        predicted[column] = token

    def forward(input_ids, logits_to_keep, **_):
        chosen = predicted[logits_to_keep].expand(len(input_ids), -1)
        logits = torch.nn.functional.one_hot(chosen, VOCABULARY).float() * 9
        return type("Output", (), {"logits": logits})

    model.forward = forward
    return model


def test_a_finished_batch_ends_early_and_is_filled_with_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dta_plugin.diffusion.family.check_attention", lambda *_: None)
    seen = traced(monkeypatch)
    model = one_token_model({5 + 6: EOS}, default=20)
    result = sample(model, FAMILY, PROMPTS, PROMPT_MASK, SMALL)
    assert result.model_calls == len(seen) == 4  # two of three blocks
    assert result.completion_ids.tolist() == [[20] * 6 + [EOS] * 6] * 3
    assert result.lengths.tolist() == [7] * 3


def test_finished_rows_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    family = dataclasses.replace(FAMILY, eos_token_ids=tuple(range(2, 12)))
    prompts = torch.randint(12, 31, (24, 5), generator=seeded())
    warm = dataclasses.replace(SMALL, temperature=2.0)
    result = sample(diffusion_model(), family, prompts, None, warm, seeded(1))
    counts = [len(ids) for ids in seen]
    assert counts == sorted(counts, reverse=True) and counts[0] == 24 > counts[-1]
    running = [int((result.lengths > 4 * block).sum()) for block in range(3)]
    assert [counts[2 * block] for block in range(len(counts) // 2)] == running[: len(counts) // 2]
    for row, length in zip(result.completion_ids, result.lengths, strict=True):
        is_end = torch.isin(row, torch.tensor(family.eos_token_ids))
        assert not is_end[: length - 1].any()
        assert length == 12 or bool(is_end[length - 1])
        assert (row[length:] == 2).all()


def test_guidance_moves_the_logits_away_from_those_without_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    model = diffusion_model()
    guided = dataclasses.replace(SMALL, guidance_scale=1.5)
    ids = torch.cat([PROMPTS, PROMPTS], 1)
    reader = block_cache.BlockReader(model, FAMILY, guided, prompt_length=5)
    logits = reader.logits(ids, torch.ones(3, 10), slice(6, 9))
    blind = torch.cat([torch.full_like(PROMPTS, MASK), PROMPTS], 1)
    conditional, unconditional = (predictions(model, FAMILY, given, None, slice(6, 9)) for given in (ids, blind))
    torch.testing.assert_close(logits, 2.5 * conditional - 1.5 * unconditional, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1 and torch.equal(seen[0], torch.cat([ids, blind]))
    different = sample(model, ENDLESS, PROMPTS, PROMPT_MASK, guided)
    assert not torch.equal(different.completion_ids, sample(model, ENDLESS, PROMPTS, PROMPT_MASK, SMALL).completion_ids)


def test_blocks_of_block_attention_continue_those_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    family = dataclasses.replace(ENDLESS, block_length=4)
    whole = dataclasses.replace(SMALL, kv_cache="none")
    result = sample(diffusion_model(), family, PROMPTS[:1], None, whole)  # five prompt tokens: three open places
    states = [ids[0, 5:] for ids in seen]
    assert [int((s != MASK).sum()) for s in states] == [0, 2, 3, 5, 7, 9, 11]
    assert (result.completion_ids != MASK).all()
    assert [len(s) for s in states] == [3, 3, 7, 7, 11, 11, 12]  # later blocks are not run
    with pytest.raises(InvalidInputError, match="set block_length=2"):
        sample(diffusion_model(), dataclasses.replace(family, block_length=2), PROMPTS, None, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_length": 13}, "multiple of block_length"),
        ({"block_length": 0}, "multiple of block_length"),
        ({"steps": 2}, "Expected a multiple of 3"),
        ({"steps": 7}, "Expected a multiple of 3"),
        ({"steps": 15}, "at most gen_length=12"),
        ({"temperature": -1.0}, "at least 0"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"remasking": "entropy"}, "Expected one of low_confidence, random"),
        ({"kv_cache": "on"}, "Expected one of auto, none, prefix, dual"),
        ({"confidence_threshold": 1.0, "steps": None}, r"a probability in \(0, 1\)"),
        ({"confidence_threshold": 0.9}, "confidence_threshold=0.9 with steps=6"),
        ({"confidence_threshold": 0.9, "steps": None, "remasking": "random"}, "remasking='random'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_the_defaults_go_together() -> None:
    assert (SamplerConfig().blocks, SamplerConfig().calls_per_block) == (8, 16)


@pytest.mark.parametrize(("length", "expected"), [(256, 32), (100, 25), (210, 30), (48, 24), (7, 7), (31, 31), (37, 1)])
def test_a_canvas_is_cut_into_the_largest_blocks_up_to_32(length: int, expected: int) -> None:
    assert default_block_length(length) == expected


def test_rows_that_begin_in_the_middle_of_a_block_may_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one block more than the others, in which nobody is left."""
    monkeypatch.setattr("dta_plugin.diffusion.family.check_attention", lambda *_: None)
    family = dataclasses.replace(FAMILY, block_length=4)
    whole = dataclasses.replace(SMALL, kv_cache="none")
    prompts, mask = padded([[3, 4, 5, 6], [8, 9]])
    model = diffusion_model(tie_word_embeddings=False)

    def forward(input_ids, logits_to_keep, **_):
        """The row with the short prompt ends at once."""
        tokens = torch.where((input_ids[:, :1] == 0), EOS, 20).expand(-1, len(logits_to_keep))
        return type("Output", (), {"logits": torch.nn.functional.one_hot(tokens, VOCABULARY).float() * 9})

    model.forward = forward
    found = sample(model, family, prompts, mask, whole)
    assert found.lengths.tolist() == [12, 1] and (found.canvas_ids[0] == 20).all()


def test_a_prompt_that_is_too_long_is_refused() -> None:
    model = diffusion_model(max_position_embeddings=16)
    sample(model, FAMILY, PROMPTS[:, :4], None, SMALL)
    with pytest.raises(InvalidInputError, match=r"prompt of 5 tokens and a canvas of 12 .* 16 positions.*at most 4"):
        sample(model, FAMILY, PROMPTS, PROMPT_MASK, SMALL)
    left = torch.nn.functional.pad(PROMPTS[:, :4], (3, 0))
    sample(model, FAMILY, left, torch.nn.functional.pad(torch.ones(3, 4), (3, 0)), SMALL)  # padding has no position


def test_a_threshold_commits_what_is_sure_and_the_surest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traced(monkeypatch)
    model, threshold = diffusion_model(initializer_range=0.3), 0.2
    config = SamplerConfig(gen_length=12, block_length=6, confidence_threshold=threshold)
    found = sample(model, ENDLESS, PROMPTS, PROMPT_MASK, config)
    attention = torch.nn.functional.pad(PROMPT_MASK, (0, 12), value=1)
    states = [ids[:, 5:] for ids in seen] + [found.canvas_ids]
    several = alone = 0
    for call, (before, after) in enumerate(itertools.pairwise(states)):
        block = 0 if bool((before[:, :6] == MASK).any()) else 6
        scores = predictions(model, ENDLESS, seen[call], attention, slice(5, None)).double()
        scores[..., MASK] = float("-inf")
        best = scores.softmax(dim=-1).max(dim=-1).values
        best[before != MASK] = 0.0
        best[:, block + 6 :] = 0.0
        for row in range(3):
            sure = {i for i in range(12) if best[row, i] >= threshold} or {int(best[row].argmax())}
            sure = sure if bool(best[row].any()) else set()
            assert set((before[row] != after[row]).nonzero()[:, 0].tolist()) == sure
            assert (found.steps[row, list(sure)] == call).all()
            several, alone = several + (len(sure) > 1), alone + (len(sure) == 1)
    assert several and alone and 2 < found.model_calls == len(seen) < 12
    assert not (found.canvas_ids == MASK).any()


def test_a_threshold_that_nothing_reaches_commits_one_token_per_call() -> None:
    model = diffusion_model()
    surest = SamplerConfig(gen_length=8, block_length=4, confidence_threshold=0.999)
    slow = sample(model, ENDLESS, PROMPTS, None, surest)
    single = sample(model, ENDLESS, PROMPTS, None, SamplerConfig(gen_length=8, block_length=4, steps=8))
    assert slow.model_calls == 8
    assert torch.equal(slow.canvas_ids, single.canvas_ids) and torch.equal(slow.steps, single.steps)
