"""Any deal of a window's rows over its micro-batches gives the gradient of stock TRL, unequal contents or not.

Rows of very different lengths are dealt out at random, and the gradient of each optimizer step, the second of them
off-policy, is compared with stock TRL's: the norm of the difference over the norm of the gradient. Log-probs and losses
are float32; the model is float64, because dense and tree differ by 1e-6 in float32 however rows are dealt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer, regroup
from dta_plugin.adapters.trl.generation_batch import RowTable
from tests.adapters.trl.support import VOCABULARY, build
from tests.adapters.trl.test_regroup import COMPOSITION

GRPO = ((GRPOTrainer, GRPOConfig), (TreeGRPOTrainer, TreeGRPOConfig))
RLOO = ((RLOOTrainer, RLOOConfig), (TreeRLOOTrainer, TreeRLOOConfig))
EXACT, CLEAR = 1e-6, 1e-4
# Ratios of the off-policy step that come from sums over a completion's float32 log-probs, about -100.
EXACT_OF_SUMS, SUMS = 1e-5, ("rloo", "vespo")
Gradients = list[torch.Tensor]


def uneven_prompts() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    words = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 60, 8, 35) * 4]
    return Dataset.from_list([{"prompt": " ".join(f"w{word}" for word in row)} for row in words])


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: Gradients = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients).clone())


def gradients(model: str, output: Path, classes: tuple[type, type], **config: Any) -> Gradients:
    """Of each of two optimizer steps on one generation: 4 micro-batches of 4 rows, two per step."""
    spread = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    fixed = {"max_completion_length": 24, "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-3, **spread}
    data = {"train_dataset": uneven_prompts()}
    trainer = build(model, output, *classes, trainer_options=data, **fixed | config)
    trainer.model.double()
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.gradients) == 2 and all(gradient.norm() > 1e-2 for gradient in recorder.gradients)
    return recorder.gradients


def apart(stock: Gradients, tree: Gradients) -> float:
    worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(stock, tree, strict=True))
    print(f"gradients differ by {worst:.1e}")
    return worst


def at_random(seed: int) -> Callable[..., list[list[int]]]:
    """In place of `to_micro_batches`."""
    chance = random.Random(seed)

    def deal(sequences: list[Any], first_scored: list[int], sizes: list[int], model: Any) -> list[list[int]]:
        order = chance.sample(range(len(sequences)), len(sequences))
        return [order[a:b] for a, b in pairwise([0, *accumulate(sizes)])]

    return deal


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "rloo"])
def test_any_deal_has_the_gradient_of_stock(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    stock_classes, tree_classes = RLOO if loss == "rloo" else GRPO
    options: dict[str, Any] = {"beta": 0.04} | ({} if loss == "rloo" else {"loss_type": loss})
    stock = gradients(model, tmp_path, stock_classes, **options)
    for seed in range(2):
        monkeypatch.setattr(regroup, "to_micro_batches", at_random(seed))
        tree = gradients(model, tmp_path, tree_classes, dta_merge_window="never", **options)
        assert apart(stock, tree) <= (EXACT_OF_SUMS if loss in SUMS else EXACT)


@pytest.mark.parametrize("name", ["bnpo", "entropy_quantile", "entropy_bonus"])
def test_losses_over_micro_batches_keep_their_rows(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Left in TRL's order, merged or not; and, the negative control, another gradient where that is overruled."""
    monkeypatch.setattr(regroup, "to_micro_batches", at_random(0))
    options = COMPOSITION[name][0]
    stock = gradients(model, tmp_path, GRPO[0], **options)
    for merge in ("never", "always"):
        assert apart(stock, gradients(model, tmp_path, GRPO[1], dta_merge_window=merge, **options)) <= EXACT
    overruled = {"dta_merge_window": "never", "dta_regroup": "always"}
    assert apart(stock, gradients(model, tmp_path, GRPO[1], **overruled, **options)) > CLEAR


@pytest.mark.parametrize(("loss", "stays"), [("grpo", False), ("dr_grpo", False), ("dapo", True)])
def test_negative_control_unequal_counts(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, stays: bool
) -> None:
    """Why counts stay: means over rows change with them. Only what divides by all tokens of the generation does not."""

    def uneven(batches: list[Any], *_: Any) -> list[Any]:
        return replace(RowTable.from_batches(batches), sizes=[2, 6]).batches()

    stock = gradients(model, tmp_path, GRPO[0], loss_type=loss)
    monkeypatch.setattr(regroup, "_regrouped", uneven)
    worst = apart(stock, gradients(model, tmp_path, GRPO[1], loss_type=loss, dta_merge_window="never"))
    assert worst <= EXACT if stays else worst > CLEAR
