"""Regrouping: siblings come back together, and no optimizer step's gradient changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from dta_plugin import PrefixTree, TreeConfig
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, TreeRLOOConfig, TreeRLOOTrainer, hooks
from dta_plugin.adapters.trl.generation_batch import Inputs
from dta_plugin.adapters.trl.regroup import regroup
from dta_plugin.balance.costs import TYPICAL
from tests.adapters.trl.support import TOLERANCE, Run, assert_equal, dense_and_tree, difference, train
from tests.adapters.trl.test_equality_trainers import TreeGMPOTrainer

SPREAD = {"steps_per_generation": 4, "max_steps": 4}  # 8 prompts of 4 rollouts over 4 micro-batches of 8 rows
SEPARATE = {"dta_merge_window": "never"}
# Extremes within a micro-batch, and means over its tokens. What is logged is their mean over micro-batches, which
# depends on who shares one: extremes always, means of tokens where completions differ in length.
EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
TOKEN_MEANS = (
    *("entropy", "kl", "cispo_clip_ratio"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
)
SAME_LENGTH = {"generation_kwargs": {"min_new_tokens": 9}}
COMPOSITION: dict[str, tuple[dict[str, Any], str]] = {
    "bnpo": ({"loss_type": "bnpo"}, "loss_type='bnpo' normalises over each micro-batch"),
    "entropy_quantile": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile is taken over each micro-batch"),
    "entropy_bonus": ({"entropy_coef": 0.1}, "the entropy bonus is a mean over each micro-batch"),
    "adaptive_bonus": ({"use_adaptive_entropy": True}, "the entropy bonus is a mean over each micro-batch"),
    "router_loss": ({"router_aux_loss_coef": 1.0}, "the router loss is computed over each micro-batch"),
}


def mean_ratio(run: Run) -> float:
    return sum(entry["dta/compression_ratio"] for entry in run.dta) / len(run.dta)


def micro_batches(count: int, rows: int) -> list[Inputs]:
    """Shuffled rows of a generation batch; `advantages` numbers the rows, and every other value follows from it."""
    generator = torch.Generator().manual_seed(count)
    total = count * rows
    number = torch.randperm(total, generator=generator)
    prompt_ids = torch.stack([torch.tensor([0, 5, 6 + n % 3]) if n % 2 else torch.tensor([5, 6, 7]) for n in number])
    completion_ids = torch.stack([torch.tensor([9 + n % 4, 30 - n]) for n in number])
    completion_mask = torch.stack([torch.tensor([1, int(n % 5 > 0)]) for n in number])
    whole: Inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids > 0).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": number.float(),
        "old_per_token_logps": number[:, None] + torch.tensor([0.25, 0.5]),
        "ref_per_token_logps": number[:, None] + torch.tensor([0.125, 0.75]),
        "importance_sampling_ratio": number[:, None] * 2.0,
        "names": [f"row {n}" for n in number],
    }
    constant = {"num_items_in_batch": torch.tensor(77), "nothing": None, "text": "constant", "short": ["x"]}
    parts = [{key: value[i : i + rows] for key, value in whole.items()} for i in range(0, total, rows)]
    return [part | constant for part in parts]


def numbers(batches: list[Inputs]) -> list[int]:
    return [int(n) for batch in batches for n in batch["advantages"]]


def tree_tokens(batches: list[Inputs]) -> int:
    rows = [[real_tokens(batch, row) for row in range(len(batch["prompt_ids"]))] for batch in batches]
    return sum(PrefixTree.from_sequences(sequences).tree_tokens for sequences in rows)


def real_tokens(batch: Inputs, row: int) -> list[int]:
    ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])
    return ids[torch.cat([batch["prompt_mask"][row], batch["completion_mask"][row]]).bool()].tolist()


@pytest.mark.parametrize(
    ("count", "accumulation", "window"), [(4, 4, 4), (4, 2, 2), (4, 1, 1), (4, 6, 2), (3, 2, 1), (2, 8, 2), (1, 4, 1)]
)
def test_rows_stay_whole_and_in_their_window(count: int, accumulation: int, window: int) -> None:
    before = micro_batches(count, rows=6)
    original = {int(n): (batch, row) for batch in before for row, n in enumerate(batch["advantages"])}
    after = regroup(before, accumulation, TYPICAL, nn.Module())
    assert [len(batch["prompt_ids"]) for batch in after] == [6] * count
    for start in range(0, count, window):
        old, new = before[start : start + window], after[start : start + window]
        assert sorted(numbers(old)) == sorted(numbers(new))
        assert window == 1 or tree_tokens(new) < tree_tokens(old)
    for batch in after:
        assert batch.keys() == before[0].keys()
        for row, number in enumerate(batch["advantages"]):
            source, index = original[int(number)]
            for key, value in batch.items():
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    assert torch.equal(value[row], source[key][index]), key
            assert batch["names"][row] == source["names"][index]
        assert batch["num_items_in_batch"].item() == 77 and batch["num_items_in_batch"].ndim == 0
        assert (batch["nothing"], batch["text"], batch["short"]) == (None, "constant", ["x"])
    assert (numbers(after) != numbers(before)) == (window > 1)


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_gradients_stay(model: str, tmp_path: Path, loss: str, accumulation: int) -> None:
    """Completions differ in length. With an accumulation of 2, the second window of a generation is off-policy."""
    run = {"loss_type": loss, "gradient_accumulation_steps": accumulation, "beta": 0.04, **SPREAD}
    dense, tree = dense_and_tree(model, tmp_path, dta=SEPARATE, **run)
    assert_equal(dense, tree, ignore=(*EXTREMES, *TOKEN_MEANS))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo", "vespo"])
def test_metrics_stay_where_lengths_are_equal(model: str, tmp_path: Path, loss: str) -> None:
    run = {"loss_type": loss, "gradient_accumulation_steps": 2, "beta": 0.04, **SPREAD, **SAME_LENGTH}
    dense, tree = dense_and_tree(model, tmp_path, dta=SEPARATE, **run)
    assert_equal(dense, tree, ignore=EXTREMES)


class SeparateGMPOTrainer(TreeGMPOTrainer):
    tree_config = TreeConfig(merge_window="never")


@pytest.mark.parametrize(
    ("trainers", "configs", "dta"),
    [
        ((RLOOTrainer, TreeRLOOTrainer), (RLOOConfig, TreeRLOOConfig), SEPARATE),
        ((GMPOTrainer, SeparateGMPOTrainer), (GMPOConfig, GMPOConfig), {}),
    ],
    ids=["rloo", "gmpo"],
)
def test_gradients_of_other_trainers_stay(
    model: str, tmp_path: Path, trainers: tuple[type, type], configs: tuple[type, type], dta: dict[str, str]
) -> None:
    run = {"gradient_accumulation_steps": 2, "beta": 0.04, **SPREAD}
    dense, tree = dense_and_tree(model, tmp_path, trainers, configs, dta=dta, **run)
    assert_equal(dense, tree, ignore=(*EXTREMES, *TOKEN_MEANS))


@pytest.mark.parametrize(("accumulation", "factor"), [(2, 1.1), (4, 1.3)])
def test_sharing_rises(model: str, tmp_path: Path, accumulation: int, factor: float) -> None:
    """A window that holds the whole generation batch gets all of it; half of one, what the shuffle left there."""
    run = {"gradient_accumulation_steps": accumulation, **SPREAD}
    apart = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_regroup="never", **SEPARATE, **run)
    together = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **SEPARATE, **run)
    print(f"compression ratio {mean_ratio(apart):.2f} -> {mean_ratio(together):.2f}")
    assert mean_ratio(together) > factor * mean_ratio(apart)


@pytest.mark.parametrize("name", COMPOSITION)
def test_auto_declines_where_gradients_would_change(
    model: str, moe_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    options, reason = COMPOSITION[name]
    chosen = moe_model if name == "router_loss" else model
    run = {"gradient_accumulation_steps": 4, **SPREAD, **options, "max_steps": 2}
    with caplog.at_level(logging.INFO, "dta_plugin"):
        dense, tree = dense_and_tree(chosen, tmp_path, dta=SEPARATE, **run)
    assert_equal(dense, tree, least_ratio=1.0)
    assert [reason in message for message in caplog.messages if "stay as TRL shuffled them" in message] == [True]
    caplog.clear()
    with caplog.at_level(logging.INFO, "dta_plugin"):
        always = train(chosen, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, dta_regroup="always", **SEPARATE, **run)
    assert mean_ratio(always) > 1.2 * mean_ratio(tree)
    assert not any("stay as TRL shuffled them" in message for message in caplog.messages)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "vespo"])
def test_regrouping_across_windows_is_another_training(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Negative control: windows matter."""
    monkeypatch.setattr(hooks, "regroup", lambda buffer, _, *rest: regroup(buffer, len(buffer), *rest))
    run = {"loss_type": loss, "gradient_accumulation_steps": 2, **SPREAD, **SAME_LENGTH, "max_steps": 2}
    dense = train(model, tmp_path, GRPOTrainer, GRPOConfig, **run)
    tree = train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, **SEPARATE, **run)
    assert difference(dense, tree, ignore=(*EXTREMES, *TOKEN_MEANS)) > 1000 * TOLERANCE
