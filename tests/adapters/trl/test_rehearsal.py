"""Models that cannot run as trees, which only a call shows: their own path from the first step, nothing raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dta_plugin.adapters.trl import shared_prefixes
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.sharing.decoder_hooks import share_prefixes
from dta_plugin.sharing.rehearsal import rehearse
from tests.adapters.trl import all_trainers
from tests.adapters.trl.all_trainers import build, trainers_of_trl
from tests.adapters.trl.around_the_tree import FORWARDS, with_such_a_layer
from tests.adapters.trl.support import TOLERANCE, enabled, moved
from tests.adapters.trl.trainer_table import REFUSED, compare
from tests.support.models import tiny_model

SFT, DPO = (trainers_of_trl()[f"trl.trainer.{name}_trainer.{name.upper()}Trainer"] for name in ("sft", "dpo"))
own_model = all_trainers._model


@pytest.mark.parametrize("kind", FORWARDS)
def test_falls_back_before_the_first_step(
    kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    monkeypatch.setattr(all_trainers, "_model", lambda folder: with_such_a_layer(own_model(folder), kind))
    outcome = compare(SFT, model, tmp_path, {"probe": "off"})
    assert outcome.worst <= TOLERANCE < 1e-3 < moved(outcome.stock)
    assert outcome.how == REFUSED
    assert len([line for line in caplog.messages if "the model's own path" in line]) == 1
    monkeypatch.setattr(shared_prefixes, "rehearse", lambda *_: None)
    with enabled(probe="off"), pytest.raises(UnsupportedError, match=r"did not use the tree|a mask or bias of its own"):
        build(SFT, model, tmp_path).train()


def test_a_backend_that_does_not_run_here(model: str, tmp_path: Path) -> None:
    outcome = compare(SFT, model, tmp_path, {"backend": "flex"})
    assert outcome.worst <= TOLERANCE and outcome.how == REFUSED and "backend='flex'" in outcome.reason


def test_each_model_by_itself(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reference that cannot run as a tree does not keep the policy from it."""
    caplog.set_level("INFO", logger="dta_plugin")
    with enabled(probe="off"):
        trainer: Any = build(DPO, model, tmp_path)
        with_such_a_layer(trainer.ref_model, "around the tree")
        trainer.train()
    assert trainer._dta_sharing.shared_calls == 2
    assert len([line for line in caplog.messages if "takes its own path: Attention layer(s) [1]" in line]) == 1


def test_a_rehearsal_leaves_no_trace() -> None:
    model = tiny_model("qwen3").train()
    sharing = share_prefixes(model, TreeConfig(probe="off", min_saving=0.9, on_unsupported="dense"))
    sharing.is_paused = True
    before, state = dict(vars(sharing)), torch.get_rng_state()
    assert rehearse(model, sharing) is None
    assert vars(sharing) == before and sharing.is_attached and model.training
    assert torch.equal(torch.get_rng_state(), state)
    with_such_a_layer(model, "around the tree")
    assert "did not use the tree" in str(rehearse(model, sharing))
    assert not sharing.is_attached and "did not use the tree" in sharing.reason
