"""A critic as a tree: values of every token, GAE's advantages and several updates equal verl's own engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed; it needs an environment of its own")

from dta_plugin.adapters.verl_plugin import critic, losses
from dta_plugin.config import TreeConfig
from dta_plugin.sharing import decoder_hooks
from tests.adapters.verl.critics import build_critic, difference, save_critic, train
from tests.adapters.verl.support import AGGREGATIONS, Setup, Step

STEPS = [
    Step(),
    Step(shape="turns"),
    Step(dynamic=False),
    Step(shape="turns", dynamic=False, rows=3, remove_padding=False),
    *(Step(loss_agg_mode=mode) for mode in AGGREGATIONS[1:]),
]


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_critic(folder)


@pytest.fixture(autouse=True)
def options() -> Iterator[None]:
    critic.configure(TreeConfig())
    yield
    critic.configure(TreeConfig())


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_gae_equals_stock(strategy: str, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Values of prompts, too; and it says how it runs."""
    stock, tree = (build_critic(Setup(strategy), model, tree) for tree in (False, True))
    expected = train(stock, STEPS, whole_rows=True)
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = train(tree, STEPS, whole_rows=True)
    assert [difference(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)] == [True] * len(STEPS)
    assert all(step["dta"]["dta/dense_fallback"] == 0 for step in found)
    least = 1.5 if losses._VALUES_BY_STEP else 1.0  # verl 0.8's micro-batches, in which few siblings meet
    assert all(step["dta"]["dta/compression_ratio"] >= least for step in found)
    assert caplog.text.count("critic: ") == 1
    assert not any(step["dta"] for step in expected)


def test_the_comparison_sees_a_value_of_another_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    stock, tree = (build_critic(Setup(), model, tree) for tree in (False, True))
    spread = decoder_hooks.spread
    monkeypatch.setattr(decoder_hooks, "spread", lambda hidden, batch: spread(hidden.roll(1, 0), batch))
    assert difference(*(train(engine, [Step()])[0] for engine in (tree, stock))) > 1e-2


def test_switched_off_is_stock(model: Path) -> None:
    stock, tree = (build_critic(Setup(), model, tree) for tree in (False, True))
    critic.configure(None)
    steps = [Step(dynamic=False, remove_padding=False)]
    found, expected = train(tree, steps), train(stock, steps)
    assert not found[0]["dta"] and difference(found[0], expected[0]) == 0
    assert tree._dta_sharing.calls == 0


def test_what_a_tree_cannot_follow_runs_dense(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock, tree = (build_critic(Setup(), model, tree) for tree in (False, True))
    monkeypatch.setattr(critic, "engine_obstacle", lambda _: "rows are cut across ranks")
    with caplog.at_level("INFO", logger="dta_plugin"):
        found = train(tree, [Step(), Step()])
    assert all(step["dta"]["dta/dense_fallback"] == 1 for step in found)
    assert caplog.text.count("the critic runs dense: rows are cut across ranks") == 1
    assert max(difference(a, b) for a, b in zip(found, train(stock, [Step(), Step()]), strict=True)) < 1e-5


def test_a_model_that_does_not_name_the_plugin(model: Path) -> None:
    """Where all processes import the plugin, and options of the run leave verl's own path in place."""
    engine = build_critic(Setup(), model, tree=True)
    vars(engine.model_config)["external_lib"] = None
    assert not train(engine, [Step()])[0]["dta"]
