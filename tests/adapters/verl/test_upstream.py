"""The contract with verl: what is there passes; what is gone or called otherwise is named before anything runs."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from verl.trainer.ppo import core_algos, ray_trainer
from verl.workers import engine_workers
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from dta_plugin.adapters.contract import Name
from dta_plugin.adapters.releases import say_if_untested
from dta_plugin.adapters.verl_plugin import reach, upstream
from dta_plugin.errors import UnsupportedError
from tests.adapters.verl.batches import trainer
from tests.adapters.verl.support import Setup, build

RELEASES = r"Expected what verl 0\.8\.0 to 0\.9\.1 have; pip install 'verl==0\.9\.1\.\*'"
GROUPS = {upstream.check_engine_module: upstream._OF_ENGINES, upstream.check_worker_module: upstream._OF_WORKERS}
REQUIRED = [(check, name) for check, names in GROUPS.items() for name in names if not name.is_optional]
OPTIONAL = [name for name in upstream._OF_ENGINES if name.is_optional]


def holders(name: Name) -> list[tuple[Any, str]]:
    """Whatever has the name: a module, or a class and its bases."""
    module, _, path = name.path.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, last = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    return [(holder, last) for holder in getattr(owner, "__mro__", [owner]) if last in vars(holder)]


def with_masks_first(loss_mask: Any, loss_mat: Any, loss_agg_mode: str) -> None: ...


def with_another_name(loss_matrix: Any, loss_mask: Any, loss_agg_mode: str) -> None: ...


@pytest.fixture
def nothing_said() -> Iterator[None]:
    say_if_untested.cache_clear()
    yield
    say_if_untested.cache_clear()


def test_the_installed_release_passes() -> None:
    upstream.check_engine_module()
    upstream.check_worker_module()
    upstream.check_trainer_module(ray_trainer)


def test_the_newer_trainer_passes() -> None:
    upstream.check_trainer_module(pytest.importorskip(upstream.V1, reason="no v1 before verl 0.9"))


@pytest.mark.parametrize(("check", "name"), REQUIRED, ids=[name.path.rpartition(".")[2] for _, name in REQUIRED])
def test_what_is_missing_is_named(check: Callable[[], None], name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    for holder, attribute in holders(name):
        monkeypatch.delattr(holder, attribute)
    with pytest.raises(UnsupportedError, match=f"{name.path} is missing. {RELEASES}"):
        check()


def test_optional_names_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        for holder, attribute in holders(name):
            monkeypatch.delattr(holder, attribute)
    upstream.check_engine_module()


@pytest.mark.parametrize(
    ("function", "objection"),
    [
        (with_another_name, "has no parameter loss_mat"),
        (with_masks_first, "has its parameters loss_mat, loss_mask in another order"),
    ],
)
def test_other_parameters_are_named(
    function: types.FunctionType, objection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first parameter of `agg_loss` is what is weighted."""
    monkeypatch.setattr(core_algos, "agg_loss", types.FunctionType(function.__code__, vars(core_algos)))
    with pytest.raises(UnsupportedError, match=f"core_algos:agg_loss {objection}. {RELEASES}"):
        upstream.check_engine_module()
    monkeypatch.setattr(core_algos, "agg_loss", function)  # somebody else's
    upstream.check_engine_module()


def test_trainer_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the method is refused; the older class may be gone."""
    name = f"{upstream.V0}:RayPPOTrainer._balance_batch"
    with monkeypatch.context() as patch:
        patch.setattr(ray_trainer, "RayPPOTrainer", type("RayPPOTrainer", (), {"init_workers": print}))
        with pytest.raises(UnsupportedError, match=f"{name} is missing. {RELEASES}"):
            upstream.check_trainer_module(ray_trainer)
    monkeypatch.delattr(ray_trainer, "RayPPOTrainer")
    upstream.check_trainer_module(ray_trainer)
    v1 = types.ModuleType(upstream.V1)
    monkeypatch.setitem(sys.modules, upstream.V1, v1)
    with pytest.raises(UnsupportedError, match=r"PPOTrainer\._balance_batch is missing"):
        upstream.check_trainer_module(v1)


def test_engines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they have been initialised."""
    engine = build(Setup(), folder, tree=True)
    upstream.check_engine(engine)
    for attribute in upstream._ENGINE:
        with monkeypatch.context() as patch:
            patch.delattr(engine, attribute)
            with pytest.raises(UnsupportedError, match=f"TreeEngine has no {attribute}. {RELEASES}"):
                upstream.check_engine(engine)
    upstream.check_diffusion_engine(engine)
    monkeypatch.delattr(engine, "_autocast_dtype")
    with pytest.raises(UnsupportedError, match="TreeEngine has no _autocast_dtype"):
        upstream.check_diffusion_engine(engine)
    own = FSDPEngineWithLMHead.initialize

    def initialize(self: Any) -> None:
        own(self)
        del self._qat_enabled

    monkeypatch.setattr(FSDPEngineWithLMHead, "initialize", initialize)
    with pytest.raises(UnsupportedError, match="TreeEngine has no _qat_enabled"):
        build(Setup(), folder, tree=True)


def test_workers() -> None:
    part = SimpleNamespace(engine=object(), engine_config=object())
    upstream.check_worker(SimpleNamespace(config=object(), actor=part, ref=None))
    with pytest.raises(UnsupportedError, match="has no engine_config"):
        upstream.check_worker(SimpleNamespace(config=object(), actor=SimpleNamespace(engine=object()), ref=None))
    with pytest.raises(UnsupportedError, match="has no ref"):
        upstream.check_worker(SimpleNamespace(config=object(), actor=part))
    assert hasattr(engine_workers.ActorRolloutRefWorker, "set_dispatch_collect")


def test_trainers() -> None:
    one = trainer("v0", ranks=2, mini_batch=4, n=2)
    upstream.check_trainer(one)
    one.actor_rollout_wg = SimpleNamespace()
    with pytest.raises(UnsupportedError, match="has no _dispatch_info"):
        upstream.check_trainer(one)
    del one.actor_rollout_wg
    with pytest.raises(UnsupportedError, match="has no actor_rollout_wg"):
        upstream.check_trainer(one)


@pytest.mark.parametrize("found", ["0.10.0.dev0", "0.10.0rc1", "0.7.1"])
def test_versions_that_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: found)
    with pytest.raises(UnsupportedError, match=f"verl {found} is installed. Expected 0.8.0 <= verl < 0.10"):
        reach.checked_version()


@pytest.mark.usefixtures("nothing_said")
def test_a_newer_release_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.9.2")
    assert [reach.checked_version() for _ in range(2)] == ["0.9.2"] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "verl 0.9.2, newer than what was tested, up to verl 0.9.1" in record.message
