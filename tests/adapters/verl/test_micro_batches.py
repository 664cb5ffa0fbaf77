"""Which rows run together: budgets of tree tokens, siblings, and losses that rows may not be moved for."""

from __future__ import annotations

import functools
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss, sft_loss

from dta_plugin import PrefixTree
from dta_plugin.adapters.verl_plugin.jagged import JaggedRows, token_rows
from dta_plugin.adapters.verl_plugin.micro_batches import as_planned, clear_plan, may_regroup, planner, set_plan
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.config import TreeConfig
from tests.adapters.verl.support import (
    ADDITIVE,
    ADDITIVE_LOSSES,
    AGGREGATIONS,
    Setup,
    Step,
    actor_config,
    build,
    log_probs,
    mini_batch,
    nested,
)


def _loss(step: Step) -> Any:
    return functools.partial(ppo_loss, config=actor_config(step))


@pytest.fixture(autouse=True)
def _group(rank: None) -> None:
    """One process group of one rank."""


@pytest.mark.parametrize("shape", ["groups", "turns"])
@pytest.mark.parametrize("budget", [30, 48, 90, 10_000])
def test_budget_counts_tree_tokens(shape: str, budget: int) -> None:
    data = mini_batch(Step(shape=shape, budget=budget))
    sequences = token_rows(data)
    plans = planner(data, sequences, TYPICAL)
    plan = plans.plan(plans.count)
    assert plan is not None
    assert sorted(chain.from_iterable(plan)) == list(range(len(sequences)))
    for indices in plan:
        tokens = PrefixTree.from_sequences([sequences[i] for i in indices]).tree_tokens
        assert tokens <= budget or len(indices) == 1
    assert plans.count <= -(-sum(map(len, sequences)) // budget) or budget < 90


def test_whole_groups_together() -> None:
    """Four prompts, interleaved; a budget that holds two groups."""
    data = mini_batch(Step(budget=96))
    plans = planner(data, token_rows(data), TYPICAL)
    plan = plans.plan(plans.count)
    assert plan is not None
    prompts = [{index % 4 for index in indices} for indices in plan]
    assert sum(map(len, prompts)) == 4


def test_as_many_as_other_ranks_make() -> None:
    data = mini_batch(Step(budget=10_000))
    plans = planner(data, token_rows(data), TYPICAL)
    assert plans.count == 1
    plan = plans.plan(5)
    assert plan is not None and len(plan) == 5 and all(plan)
    assert plans.plan(len(data) + 1) is None


def test_static_sizes_stay_verls() -> None:
    data = mini_batch(Step(dynamic=False, rows=4))
    plans = planner(data, token_rows(data), TYPICAL)
    plan = plans.plan(plans.count)
    assert plan is not None
    assert [len(indices) for indices in plan] == [4] * 4
    assert all(len({index % 4 for index in indices}) == 1 for indices in plan)


def test_a_plan_is_followed_once_and_leaves_no_trace() -> None:
    def stock(data: Any) -> str:
        return "stock"

    data = mini_batch(Step(dynamic=False))
    keys = set(data.keys())
    prepare = as_planned(stock)
    assert prepare(data) == "stock"
    set_plan(data, [[1, 0], [2]])
    micro_batches, indices = prepare(data)
    assert indices == [[1, 0], [2]]
    assert [row.tolist() for row in micro_batches[0]["input_ids"].unbind()] == [
        row.tolist() for row in (data["input_ids"][1], data["input_ids"][0])
    ]
    assert tu.get_non_tensor_data(data, "use_dynamic_bsz", None) is True  # verl restores the order
    clear_plan(data)
    assert set(data.keys()) == keys
    assert tu.get_non_tensor_data(data, "use_dynamic_bsz", None) is False


def test_where_rows_may_move() -> None:
    data, config = mini_batch(Step()), "auto"
    assert may_regroup(data, config, _loss(Step()), forward_only=False)
    assert may_regroup(data, config, None, forward_only=True)
    assert may_regroup(data, config, functools.partial(sft_loss, config=None), forward_only=False)
    assert not may_regroup(data, "never", None, forward_only=True)
    assert not may_regroup(data, config, lambda **_: None, forward_only=False)
    assert may_regroup(data, "always", lambda **_: None, forward_only=False)
    assert not may_regroup(data, config, _loss(Step(loss_agg_mode="seq-mean-token-sum-norm")), forward_only=False)
    for loss in set(POLICY_LOSS_REGISTRY) - ADDITIVE:
        assert not may_regroup(data, config, _loss(Step(loss_mode=loss)), forward_only=False)
    tu.assign_non_tensor(data, force_group_size=2)
    assert not may_regroup(data, "always", None, forward_only=True)
    local = mini_batch(Step(extra={"global_batch_size": None}))
    assert not may_regroup(local, config, _loss(Step()), forward_only=False)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", ADDITIVE_LOSSES)
def test_additive_losses_are(loss: str, aggregation: str) -> None:
    """Their gradient is that of the whole mini-batch however it is cut; verl's own code says so."""
    step = Step(loss_mode=loss, loss_agg_mode=aggregation)
    cuts = [[list(range(16))], [[0, 1, 2], list(range(3, 10)), list(range(10, 16))], [[i] for i in range(16)]]
    whole, *others = (_gradient(step, cut) for cut in cuts)
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-7)


def test_others_are_not() -> None:
    for loss in ("geo_mean", "kl_cov"):
        step = Step(loss_mode=loss)
        whole, cut = (_gradient(step, cut) for cut in ([list(range(16))], [[0, 1, 2], list(range(3, 16))]))
        assert (whole - cut).abs().max() > 1e-4 * whole.abs().max()


def _gradient(step: Step, cut: list[list[int]]) -> torch.Tensor:
    """Of the summed micro-batch losses, in log-probs of all tokens."""
    data = mini_batch(step)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(data["loss_mask"].values().sum()))
    lengths = data["input_ids"].offsets().diff().tolist()
    generator = torch.Generator().manual_seed(0)
    values = [(-torch.rand(length, generator=generator)).requires_grad_() for length in lengths]
    data["old_log_probs"] = nested([row - 0.7 for row in data["advantages"].unbind()])
    data["ref_log_prob"] = data["old_log_probs"]
    for indices in cut:
        micro_batch = tu.index_select_tensor_dict(data, indices)
        output = {
            "log_probs": nested([values[i] for i in indices]),
            "entropy": nested([values[i] ** 2 for i in indices]),
        }
        _loss(step)(model_output=output, data=micro_batch)[0].backward()
    return torch.cat([value.grad for value in values])


def test_rows_and_back(folder: Path) -> None:
    data = mini_batch(Step(shape="turns", temperature=None))
    rows = JaggedRows.whole(data)
    assert [row.tolist() for row in rows.runs.sequences] == [row.tolist() for row in data["input_ids"].unbind()]
    assert rows.runs.scored == data["prompts"].offsets().diff().tolist()
    assert set(rows.temperature) == {torch.tensor(x).item() for x in (0.7, 1.0, 1.3)}
    values = [torch.arange(1.0, len(row)) for row in rows.runs.sequences]
    back = rows.nested(values)
    assert torch.equal(back.offsets(), data["input_ids"].offsets())
    assert all((row[:-1] == value).all() and row[-1] == 0 for row, value in zip(back.unbind(), values, strict=True))


def test_padded_prompts_of_the_older_trainer() -> None:
    """trainer.use_v1=False: prompts padded left, and kept so."""
    data = mini_batch(Step())
    expected = JaggedRows.whole(data).runs.scored
    prompts = data["prompts"].unbind()
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in prompts])
    data["prompts"] = padded
    data["attention_mask"] = torch.cat([(padded > 0).long(), torch.ones(len(data), 9, dtype=torch.long)], dim=1)
    assert JaggedRows.whole(data).runs.scored == expected


def test_sft_batches_are_scored_by_their_mask() -> None:
    data = mini_batch(Step())
    del data["prompts"]
    masks = [torch.arange(len(row)) % 3 == 1 for row in data["input_ids"].unbind()]
    data["loss_mask"] = nested([mask.long() for mask in masks])
    scored = JaggedRows.whole(data).runs.scored
    assert scored is not None
    assert all((row == mask.numpy()).all() for row, mask in zip(scored, masks, strict=True))


def test_never_keeps_verls_micro_batches(folder: Path) -> None:
    """Log-probs are the same either way."""
    engine = build(Setup(), folder, tree=True)
    results = []
    for regroup in ("auto", "never"):
        engine.configure(TreeConfig(regroup=regroup))
        results.append(log_probs(engine, mini_batch(Step()))["log_probs"].values())
    assert (results[0] - results[1]).abs().max() < 1e-5
