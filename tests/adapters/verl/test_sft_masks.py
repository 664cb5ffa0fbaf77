"""Masks of SFT batches: verl's `sft_loss` shifts that of a whole micro-batch by one, over the ends of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tensordict import TensorDict
from verl.workers.utils.losses import sft_loss

from dta_plugin.adapters.verl_plugin import obstacles
from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from tests.adapters.verl.support import Setup, Step, build, mini_batch, nested
from tests.adapters.verl.updates import local_gradient, relative

Mask = Callable[[int, int], torch.Tensor]
LOSS = functools.partial(sft_loss, config=None)


def _responses(length: int, begin: int) -> torch.Tensor:
    return (torch.arange(length) >= begin).long()


def _all(length: int, _: int) -> torch.Tensor:
    return torch.ones(length, dtype=torch.long)


def _batch(mask: Mask, **options: Any) -> TensorDict:
    data = mini_batch(Step(temperature=1.0, extra={"calculate_entropy": False}, **options))
    begins, lengths = data["prompts"].offsets().diff().tolist(), data["input_ids"].offsets().diff().tolist()
    data["loss_mask"] = nested([mask(length, begin) for length, begin in zip(lengths, begins, strict=True)])
    for name in ("prompts", "responses", "response_mask", "advantages"):
        del data[name]
    return data


def _update(engine: Any, data: TensorDict) -> tuple[float, torch.Tensor]:
    """Loss and gradient."""
    engine.module.train()
    output = engine.forward_backward_batch(data.copy(), LOSS)
    gradient = local_gradient(engine)
    engine.optimizer_zero_grad()
    return sum(output["loss"]), gradient


@pytest.fixture(scope="module")
def engines(folder: Path) -> tuple[TreeEngine, Any]:
    tree, stock = (build(Setup(), folder, tree=tree) for tree in (True, False))
    return tree, stock


@pytest.mark.parametrize("options", [{}, {"dynamic": False, "remove_padding": False}], ids=["dynamic", "static"])
def test_masks_of_datasets(options: dict[str, Any], engines: tuple[TreeEngine, Any]) -> None:
    tree, stock = engines
    tree.configure(TreeConfig())
    data = _batch(_responses, **options)
    (loss, gradient), (expected_loss, expected) = _update(tree, data), _update(stock, data)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_mask_that_counts_first_tokens(
    engines: tuple[TreeEngine, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """verl then reads what the end of one row predicts of the next: refused, or verl's own path."""
    tree, stock = engines
    data = _batch(_all)
    tree.configure(TreeConfig())
    with pytest.raises(UnsupportedError, match="loss_mask counts the first token of a row"):
        _update(tree, data)
    tree.configure(TreeConfig(on_unsupported="dense"))
    with caplog.at_level("INFO", logger="dta_plugin"):
        loss, gradient = _update(tree, data)
    expected_loss, expected = _update(stock, data)
    assert loss == expected_loss and torch.equal(gradient, expected)
    assert "verl's own path: loss_mask counts the first token of a row" in caplog.text
    monkeypatch.setattr(obstacles, "_counts_first_tokens", lambda _: False)  # negative control
    assert relative(_update(tree, data)[1], expected) > 1e-2
