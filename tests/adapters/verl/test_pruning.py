"""Tokens that carry no loss are left out of updates: the gradient stays what it was, for every policy loss."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin import losses, tokens
from dta_plugin.adapters.verl_plugin.engine import TreeEngine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from tests.adapters.verl import updates
from tests.adapters.verl.support import Setup, Step, actor_config, build, nested
from tests.adapters.verl.updates import Update, relative, sampled, updated, without_regularisers

TOLERANCE = 1e-6
ALL = TreeConfig()
LOSSES = sorted(POLICY_LOSS_REGISTRY.keys() - {"bypass_mode"})
NO_ENTROPY = {"calculate_entropy": False}


@pytest.fixture(scope="module")
def engine(folder: Path) -> TreeEngine:
    return build(Setup(), folder, tree=True)


def _batch(engine: TreeEngine, **extra: Any) -> TensorDict:
    """All rows of one prompt without an advantage, one row of another, and in all the first and the last token."""
    data = sampled(engine, Step(extra=NO_ENTROPY | extra))
    advantages = [row.clone() for row in data["advantages"].unbind()]
    for row, values in enumerate(advantages):
        values[: None if row % 4 == 1 or row == 6 else 1] = values[-1] = 0
    data["advantages"] = nested(advantages)
    return data


def _both(engine: TreeEngine, data: TensorDict, actor: Any, config: TreeConfig = ALL) -> list[Update]:
    """Everything run, and without what carries no loss."""
    torch.manual_seed(0)  # clip_cov draws tokens
    full = updated(engine, data, replace(config, prune="never"), actor)
    torch.manual_seed(0)
    return [full, updated(engine, data, config, actor)]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_and_loss_stay(loss: str, engine: TreeEngine) -> None:
    full, pruned = _both(engine, _batch(engine), without_regularisers(actor_config(Step(loss_mode=loss))))
    assert relative(pruned.gradient, full.gradient) < TOLERANCE
    for name in ("loss", "actor/pg_loss"):
        assert pruned.metrics[name] == pytest.approx(full.metrics[name], rel=1e-5)
    left_out = pruned.metrics["dta/pruned_tokens"]
    assert full.metrics["dta/pruned_tokens"] == 0
    assert full.metrics["dta/flat_tokens"] == pruned.metrics["dta/flat_tokens"] + left_out
    assert (left_out > 4 * 20) == (loss not in ("dro", "clip_cov", "kl_cov"))
    assert (pruned.metrics["dta/tree_tokens"] < full.metrics["dta/tree_tokens"]) == (left_out > 0)


def test_pruned_tokens_count_as_unchanged(engine: TreeEngine) -> None:
    """The one metric of verl's that tells, as docs/verl.md says."""
    full, pruned = _both(engine, _batch(engine), without_regularisers(actor_config(Step(loss_mode="vanilla"))))
    assert 0 < abs(pruned.metrics["actor/ppo_kl"]) < 0.5 * abs(full.metrics["actor/ppo_kl"])


@pytest.mark.parametrize("loss", ["dro", "gspo"])
def test_negative_control(loss: str, engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """These do read tokens without an advantage, some of which are in every row."""
    if loss not in POLICY_LOSS_REGISTRY:
        pytest.skip("not in this verl")
    wrong = replace(losses.POLICY_LOSSES[loss], without_advantage="tokens")
    monkeypatch.setitem(losses.POLICY_LOSSES, loss, wrong)
    full, pruned = _both(engine, _batch(engine), without_regularisers(actor_config(Step(loss_mode=loss))))
    assert relative(pruned.gradient, full.gradient) > 100 * TOLERANCE


@pytest.mark.parametrize("reads", ["kl", "entropy"])
def test_what_a_regulariser_reads_stays(reads: str, engine: TreeEngine) -> None:
    data = _batch(engine, calculate_entropy=reads == "entropy")
    actor = replace(without_regularisers(actor_config(Step())), use_kl_loss=reads == "kl")
    full, pruned = _both(engine, data, actor)
    assert relative(pruned.gradient, full.gradient) < TOLERANCE
    assert pruned.metrics["dta/pruned_tokens"] == 0


def test_masked_tails(engine: TreeEngine) -> None:
    """Such as the result of a tool at the end, or all of a row that was too long."""
    data = sampled(engine, Step(shape="turns", budget=10_000))  # verl averages some metrics over micro-batches
    masks = [mask.clone() for mask in data["response_mask"].unbind()]
    masks[0][2:], masks[3][1:], masks[10][:] = 0, 0, 0  # the second token of every row is masked already
    data["response_mask"] = data["loss_mask"] = nested(masks)
    full, pruned = _both(engine, data, actor_config(Step()))
    assert relative(pruned.gradient, full.gradient) < TOLERANCE
    torch.testing.assert_close(pruned.numbers, full.numbers, rtol=1e-5, atol=1e-6)
    lengths, last = data["input_ids"].offsets().diff(), data["responses"].offsets().diff()
    gone = (last[0] - 1) + (last[3] - 1) + (lengths[10] - 1)
    assert pruned.metrics["dta/pruned_tokens"] == gone


@pytest.mark.parametrize("executor", ["packed", "streamed"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_nothing_to_learn(executor: str, strategy: str, folder: Path) -> None:
    """All rewards alike: one token runs, gradients are 0, nothing fails."""
    if (strategy, executor) == ("fsdp", "streamed"):
        pytest.skip("FSDP 1 cannot run in chunks")
    engine = build(Setup(strategy), folder, tree=True)
    data = sampled(engine, Step(extra=NO_ENTROPY))
    data["advantages"] = nested([row * 0 for row in data["advantages"].unbind()])
    actor = without_regularisers(actor_config(Step()))
    options = {} if executor == "packed" else {"executor": executor, "max_tree_tokens_per_chunk": 20}
    for selected in ({}, {"token_selection": "rpc"}):
        found = updated(engine, data, TreeConfig(verify="every:1", **options, **selected), actor)
        assert found.metrics["loss"] == 0
        assert len(found.gradient) and not found.gradient.any()
        assert found.metrics["dta/tree_tokens"] < 5 and found.metrics["dta/compression_ratio"] == 1
    assert found.metrics["dta/kept_fraction"] == found.metrics["dta/max_weight"] == 1


def test_selection_draws_from_what_is_left(engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens.OptimizerPasses, "next", lambda *_: 3)
    data, actor = _batch(engine), without_regularisers(actor_config(Step()))
    everything = TreeConfig(token_selection="rpc", token_budget=1.0)
    full, pruned = _both(engine, data, actor, everything)
    assert relative(pruned.gradient, full.gradient) < TOLERANCE
    half = updated(engine, data, TreeConfig(token_selection="rpc"), actor)
    assert half.metrics["dta/pruned_tokens"] > pruned.metrics["dta/pruned_tokens"] > 0


def test_unknown_losses_and_readers_keep_everything(engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "mine", None)
    register_policy_loss("mine")(POLICY_LOSS_REGISTRY["vanilla"])
    actor = without_regularisers(actor_config(Step(loss_mode="mine")))
    assert updated(engine, _batch(engine), ALL, actor).metrics["dta/pruned_tokens"] == 0
    data = _batch(engine)
    tu.assign_non_tensor(data, return_model_output=True)
    known = without_regularisers(actor_config(Step()))
    assert updated(engine, data, ALL, known).metrics["dta/pruned_tokens"] == 0
    assert updated(engine, _batch(engine), ALL, known).metrics["dta/pruned_tokens"] > 0


def _reads_its_row(old_log_prob: Any, log_prob: Any, advantages: Any, response_mask: Any, **kwargs: Any) -> Any:
    """A policy loss of a user's, in which a token without an advantage counts."""
    summed = (log_prob * response_mask).sum(-1, keepdim=True)
    of_micro_batch = (log_prob * response_mask).mean()
    return ((advantages * log_prob + 0.1 * summed * of_micro_batch) * response_mask).sum() / 100, {}


def test_a_users_loss_under_a_name_of_verls(engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is known: it has verl's own micro-batches and all tokens, and a selection is refused."""
    verls, known = POLICY_LOSS_REGISTRY["vanilla"], losses.is_verls_policy_loss
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "vanilla", verls)
    actor = without_regularisers(actor_config(Step()))
    assert losses.policy_traits(actor).is_token_sum
    for own in (_reads_its_row, functools.wraps(verls)(_reads_its_row)):
        register_policy_loss("vanilla")(own)
        dense = TreeConfig(min_saving=0.99)
        expected, found = (updated(engine, _batch(engine), config, actor) for config in (dense, ALL))
        assert expected.metrics["dta/dense_fallback"] == 1 and found.metrics["dta/dense_fallback"] == 0
        assert relative(found.gradient, expected.gradient) < 1e-5 and found.metrics["dta/pruned_tokens"] == 0
        with pytest.raises(InvalidInputError, match=r"loss_mode=vanilla \(not verl's own\)"):
            updated(engine, _batch(engine), TreeConfig(token_selection="rpc"), actor)
        monkeypatch.setattr(losses, "is_verls_policy_loss", lambda _: True)
        wrong = updated(engine, _batch(engine), ALL, actor)  # negative control
        assert relative(wrong.gradient, expected.gradient) > 1e-3
        monkeypatch.setattr(losses, "is_verls_policy_loss", known)


def test_log_probs_of_what_did_not_run(engine: TreeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the old ones, and entropies 0."""
    data = sampled(engine, Step(shape="turns"))
    seen: list[tuple[Any, TensorDict]] = []
    ppo_loss = updates.ppo_loss

    def watched(config: Any, model_output: Any, data: TensorDict, dp_group: Any = None) -> Any:
        seen.append((model_output, data))
        return ppo_loss(config, model_output, data, dp_group)

    for module in (updates, losses):
        monkeypatch.setattr(module, "ppo_loss", watched)
    updated(engine, data, TreeConfig(token_selection="rpc"))
    left_out = 0
    for output, rows in seen:
        begins = rows["prompts"].offsets().diff().tolist()
        for row, begin in enumerate(begins):
            found, entropy = (output[name][row][begin - 1 : -1] for name in ("log_probs", "entropy"))
            weights, old = rows["dta_weights"][row], rows["old_log_probs"][row]
            left_out += int((weights == 0).sum())
            assert torch.equal(found[weights == 0], old[weights == 0]) and not entropy[weights == 0].any()
            assert (found[weights > 0] != old[weights > 0]).all() and entropy[weights > 0].all()
    assert left_out > 10
