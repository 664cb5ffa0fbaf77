"""Predictions are those of the plain model, whatever the shift, the padding and the blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dta_plugin.diffusion import DiffusionFamily, predictions
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.support.models import tiny_model
from tests.support.tiny_diffusion import FAMILY, MASK, SHIFTED, diffusion_model, padded, shifted_twin

IDS = torch.tensor([[3, 4, 5, MASK, 7, MASK, 9, 10], [11, MASK, 13, 14, MASK, 16, 17, 18]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_native_model_attends_in_both_directions(family: str, attention: str) -> None:
    model = diffusion_model(family, attention=attention)
    changed = IDS.clone()
    changed[:, -1] = 20
    before, after = (predictions(model, FAMILY, ids) for ids in (IDS, changed))
    assert ((before - after).abs().amax(dim=2)[:, :-1] > 1e-4).all()


def test_columns_are_a_slice_of_all_predictions() -> None:
    model = diffusion_model()
    every = predictions(model, FAMILY, IDS)
    torch.testing.assert_close(every, model(IDS).logits)
    torch.testing.assert_close(predictions(model, FAMILY, IDS, columns=slice(3, 7)), every[:, 3:7])
    torch.testing.assert_close(predictions(model, FAMILY, IDS, columns=slice(-2, None)), every[:, -2:])


@pytest.mark.parametrize("columns", [slice(1, None), slice(3, 6), slice(7, 8)])
def test_a_shifted_model_gives_the_predictions_of_its_unshifted_twin(columns: slice) -> None:
    expected = predictions(diffusion_model(), FAMILY, IDS, columns=columns)
    twin = shifted_twin(diffusion_model())
    torch.testing.assert_close(predictions(twin, SHIFTED, IDS, columns=columns), expected, rtol=0, atol=0)
    assert not torch.allclose(predictions(twin, FAMILY, IDS, columns=columns), expected)  # negative control


def test_the_first_column_of_a_shifted_family_gets_its_own_logits() -> None:
    model = diffusion_model()
    torch.testing.assert_close(predictions(model, SHIFTED, IDS)[:, 0], model(IDS).logits[:, 0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("block_length", [None, 1, 2, 3])
def test_padding_has_no_influence(attention: str, left: bool, block_length: int | None) -> None:
    model = diffusion_model(attention=attention)
    family = dataclasses.replace(FAMILY, block_length=block_length)
    rows = [[3, 4, 5, MASK, 7, 8, MASK], [9, MASK], [10, 11, MASK, 13]]
    ids, mask = padded(rows, left)
    together = predictions(model, family, ids, mask)
    for got, row, real in zip(together, rows, mask.bool(), strict=True):
        alone = predictions(model, family, torch.tensor([row]))[0]
        torch.testing.assert_close(got[real], alone, rtol=1e-4, atol=1e-5)


def test_positions_are_counted_from_the_first_real_token() -> None:
    model, seen = diffusion_model(), []
    model.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    predictions(model, FAMILY, *padded([[3, 4, 5], [6]]))
    assert seen[-1].tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_block_attention_is_causal_over_blocks_and_full_inside(attention: str) -> None:
    model = diffusion_model(attention=attention)
    family = dataclasses.replace(FAMILY, block_length=3)
    ids, mask = padded([list(range(3, 11)), list(range(3, 9))])  # blocks of the second row start at column 2
    before = predictions(model, family, ids, mask)
    for column in range(8):
        changed = ids.clone()
        changed[:, column] = 20
        moved = (predictions(model, family, changed, mask) - before).abs().amax(dim=2) > 1e-5
        for row, start in ((0, 0), (1, 2)):
            if column >= start:
                sees = torch.arange(8) >= start + (column - start) // 3 * 3
                assert moved[row, start:].tolist() == sees[start:].tolist()
    assert not torch.allclose(before, predictions(model, FAMILY, ids, mask))  # negative control


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_block_attention_under_autocast(attention: str) -> None:
    family = dataclasses.replace(FAMILY, block_length=3)
    ids, mask = padded([list(range(3, 11)), list(range(3, 9))])
    exact = predictions(diffusion_model(attention=attention), family, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough = predictions(diffusion_model(attention=attention), family, ids, mask).float()
    real = mask.bool()
    assert (rough - exact)[real].abs().max() < 0.1 * exact.abs().max()


def test_a_causal_config_is_run_in_both_directions() -> None:
    causal, native = tiny_model("qwen3", vocab_size=32), diffusion_model()
    torch.testing.assert_close(predictions(causal, FAMILY, IDS), predictions(native, FAMILY, IDS))
    assert not torch.allclose(causal(IDS).logits, predictions(native, FAMILY, IDS))  # negative control


def test_a_model_that_stays_causal_is_refused() -> None:
    model = tiny_model("qwen3", vocab_size=32)
    decoder, run = model.model, model.model.forward
    decoder.forward = lambda *args, is_causal=None, **kwargs: run(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="attends causally"):
        predictions(model, FAMILY, IDS)


def test_a_model_that_is_causal_with_padding_only_is_refused() -> None:
    """As transformers 5.0 builds its masks: is_causal counts where there is none."""
    model = tiny_model("qwen3", vocab_size=32)
    run = model.model.forward

    def forward(*args, attention_mask=None, is_causal=None, **kwargs):
        return run(*args, attention_mask=attention_mask, is_causal=False if attention_mask is None else None, **kwargs)

    model.model.forward = forward
    with pytest.raises(UnsupportedError, match="attends causally"):
        predictions(model, FAMILY, IDS)


def test_dropout_does_not_hide_causality() -> None:
    model = tiny_model("qwen3", vocab_size=32, attention_dropout=0.5, attention="eager").train()
    run = model.model.forward
    model.model.forward = lambda *args, is_causal=None, **kwargs: run(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="attends causally"):
        predictions(model, FAMILY, IDS)


def test_a_model_that_ignores_block_masks_is_refused() -> None:
    model = diffusion_model()
    run = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: run(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="later blocks"):
        predictions(model, dataclasses.replace(FAMILY, block_length=2), IDS)


def test_block_attention_needs_full_attention_and_a_mask() -> None:
    family = dataclasses.replace(FAMILY, block_length=2)
    sliding = diffusion_model("mistral")
    with pytest.raises(UnsupportedError, match="sliding_attention layers"):
        predictions(sliding, family, IDS)
    flex = diffusion_model(attention="flex_attention")
    with pytest.raises(UnsupportedError, match="attn_implementation='flex_attention'"):
        predictions(flex, family, IDS)


def test_the_check_runs_once_per_model_and_leaves_the_random_state() -> None:
    model, calls = diffusion_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    predictions(model, FAMILY, IDS)
    predictions(model, FAMILY, IDS)
    assert len(calls) == 4 + 2
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_flow_to_the_parameters() -> None:
    model = diffusion_model()
    predictions(model, FAMILY, IDS, columns=slice(3, None)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"eos_token_ids": (31,)}, "among eos_token_ids"),
        ({"block_length": 0}, "block_length=0"),
        ({"forbidden_token_ids": (-4,)}, "forbidden_token_ids"),
    ],
)
def test_a_family_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DiffusionFamily(**({"name": "x", "mask_token_id": 31} | changes))


def test_shapes_are_checked() -> None:
    model = diffusion_model()
    with pytest.raises(InvalidInputError, match=r"Expected \[B, S\]"):
        predictions(model, FAMILY, IDS, torch.ones(2, 3))
    with pytest.raises(InvalidInputError, match="at least one token"):
        predictions(model, FAMILY, IDS, columns=slice(8, None))
