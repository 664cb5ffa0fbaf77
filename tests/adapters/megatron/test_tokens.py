"""Tokens that run: as many as with the engine for FSDP. Pruned ones change nothing, drawn ones are drawn there, too."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.workers.utils.losses import ppo_loss

from dta_plugin.config import TreeConfig
from tests.adapters.megatron import support
from tests.adapters.megatron.support import Setup, build, inferred, weights
from tests.adapters.verl import support as fsdp
from tests.adapters.verl.support import Step, actor_config, mini_batch, nested, response_rows
from tests.adapters.verl.updates import without_regularisers

COUNTS = ("flat_tokens", "tree_tokens", "pruned_tokens", "compression_ratio", "micro_batches", "dense_fallback")


def _data(engine: Any, unread: bool = False) -> TensorDict:
    """A mini-batch with old log-probs; unread: all but the first group's advantages are 0."""
    data = mini_batch(Step(shape="groups", extra={"calculate_entropy": False}))
    rows = response_rows(data, inferred(engine, data)["log_probs"]).unbind()
    data["old_log_probs"] = nested([row + 0.15 * torch.cos(torch.arange(len(row))) for row in rows])
    data["ref_log_prob"] = nested([row + 0.1 * torch.sin(torch.arange(len(row))) for row in rows])
    if unread:
        data["advantages"] = nested([row * (i % 4 == 0) for i, row in enumerate(data["advantages"].unbind())])
    return data


def _update(engine: Any, data: TensorDict, config: TreeConfig, actor: Any) -> dict[str, Any]:
    engine.configure(config)
    with engine.train_mode():
        output = engine.train_batch(data.copy(), loss_function=functools.partial(ppo_loss, config=actor))
    found = {n: v.aggregate() if hasattr(v, "aggregate") else v for n, v in output["metrics"].items()}
    return found | {"loss": sum(output["loss"])}


BATCHES = {
    "groups": Step(),
    "turns": Step(shape="turns"),
    "corners": Step(shape="corners"),
    "star": Step(shape="star"),
    "cut": Step(shape="turns", budget=30),
    "static": Step(shape="turns", dynamic=False, rows=3),
}


@pytest.fixture(scope="module")
def engines(folder: Path) -> tuple[Any, Any]:
    """Megatron's and the other one, which runs Hugging Face's model with the same weights."""
    return build(Setup(), folder, tree=True), fsdp.build(fsdp.Setup(), folder / "qwen3", tree=True)


@pytest.mark.parametrize("name", BATCHES)
def test_as_many_tokens_as_with_fsdp(name: str, engines: tuple[Any, Any]) -> None:
    """Dense, in trees, cut to the same micro-batches: the same reduction, exactly."""
    found, expected = _counts(engines, (BATCHES[name], BATCHES[name]))
    assert found == expected
    assert found["compression_ratio"] > 1.2


def test_micro_batches_that_are_cut_elsewhere_have_other_counts(engines: tuple[Any, Any]) -> None:
    found, expected = _counts(engines, (BATCHES["cut"], BATCHES["turns"]))
    assert found["flat_tokens"] == expected["flat_tokens"] and found["tree_tokens"] > expected["tree_tokens"]


def _counts(engines: tuple[Any, Any], steps: tuple[Step, Step]) -> list[dict[str, float]]:
    runs = zip((support, fsdp), engines, steps, strict=True)
    metrics = [module.train(engine, [step])[0]["dta"] for module, engine, step in runs]
    return [{name: found[f"dta/{name}"] for name in COUNTS} for found in metrics]


def test_pruning_changes_nothing(folder: Path) -> None:
    actor = without_regularisers(actor_config(Step()))
    found, ends = [], []
    for prune in ("auto", "never"):
        engine = build(Setup(), folder, tree=True)
        found.append(_update(engine, _data(engine, unread=True), TreeConfig(prune=prune), actor))
        ends.append(weights(engine))
    pruned, whole = found
    assert pruned["dta/pruned_tokens"] > 100 and whole["dta/pruned_tokens"] == 0
    assert pruned["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert pruned["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert (ends[0] - ends[1]).norm() < 1e-6 * ends[1].norm()


def test_nothing_to_read(folder: Path) -> None:
    engine = build(Setup(), folder, tree=True)
    data = _data(engine)
    data["advantages"] = nested([row * 0 for row in data["advantages"].unbind()])
    found = _update(engine, data, TreeConfig(), without_regularisers(actor_config(Step())))
    assert found["grad_norm"] == 0
    assert found["dta/tree_tokens"] < 10


@pytest.mark.parametrize("scheme", ["rpc", "urs"])
def test_the_same_tokens_are_drawn_as_with_fsdp(scheme: str, folder: Path) -> None:
    """The other engine runs Hugging Face's model with the same weights."""
    megatron = build(Setup(), folder, tree=True)
    other = fsdp.build(fsdp.Setup(), folder / "qwen3", tree=True)
    data, actor = _data(megatron), actor_config(Step())
    config = TreeConfig(token_selection=scheme)
    found, expected = (_update(engine, data, config, actor) for engine in (megatron, other))
    assert found["dta/kept_fraction"] == expected["dta/kept_fraction"] < 0.9
    for name in ("loss", "actor/pg_loss", "kl_loss", "grad_norm", "dta/tree_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
