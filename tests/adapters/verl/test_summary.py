"""The line at the end of a training says what was logged, once, and leaves verl's logger as it was."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dta_plugin.adapters.verl_plugin import summary

tracking = pytest.importorskip("verl.utils.tracking")

LOGGED = [
    {"actor/dta/flat_tokens": 900.0, "actor/dta/tree_tokens": 100.0, "actor/dta/pruned_tokens": 30.0},
    {"val-core/reward": 1.0},
    {"actor/dta/flat_tokens": 1100.0, "actor/dta/tree_tokens": 300.0, "actor/dta/pruned_tokens": 0.0},
]


class Trainer:
    """One that logs as verl's do. fallback: the share of micro-batches that every step reports."""

    def __init__(self, fallback: float = 0.0) -> None:
        self.fallback = fallback

    def fit(self, logged: list[dict[str, float]]) -> str:
        logger = tracking.Tracking("project", "run", default_backend=[])
        for step, metrics in enumerate(logged):
            more = {"actor/dta/dense_fallback": self.fallback} if len(metrics) > 1 else {}
            logger.log(data=metrics | more, step=step)
        return "what fit returns"


class AwaitedTrainer(Trainer):
    """Its `fit` is a coroutine, as that of `one_step_off_policy`."""

    async def fit(self, logged: list[dict[str, float]]) -> str:
        await asyncio.sleep(0)
        return Trainer.fit(self, logged)


@pytest.mark.parametrize("kind", [Trainer, AwaitedTrainer])
def test_line(kind: type[Trainer], caplog: pytest.LogCaptureFixture) -> None:
    trainer = type("Extended", (kind,), {})
    for _ in range(2):
        summary.install_in(trainer)
    before = tracking.Tracking.log
    with caplog.at_level("INFO", logger="dta_plugin"):
        result: Any = trainer(fallback=0.25).fit(LOGGED)
        assert (asyncio.run(result) if kind is AwaitedTrainer else result) == "what fit returns"
    assert caplog.messages == [
        "dta: in this training: 2 steps, 1,000 -> 200 tokens, 15 more pruned in an update of one rank on average "
        "(5.00x shared); 25% of micro-batches took verl's own path"
    ]
    assert tracking.Tracking.log is before


def test_silent_where_the_plugin_did_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dta_plugin"):
        summary.summed_up(Trainer.fit)(Trainer(), [{"val-core/reward": 1.0}])
    assert not caplog.messages


def test_a_training_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    before = tracking.Tracking.log

    def fails(logged: list[dict[str, float]]) -> None:
        Trainer().fit(logged)
        raise RuntimeError("out of memory")

    with caplog.at_level("INFO", logger="dta_plugin"), pytest.raises(RuntimeError, match="out of memory"):
        summary.summed_up(fails)(LOGGED)
    assert not caplog.messages and tracking.Tracking.log is before
