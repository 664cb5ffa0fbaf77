"""The contract with TRL: what is there passes; what is gone or called otherwise is named before anything runs."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer

import dta_plugin
from dta_plugin.adapters.contract import Name, require
from dta_plugin.adapters.releases import say_if_untested
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer, upstream
from dta_plugin.adapters.trl.upstream import HOOK, PREPARE
from dta_plugin.errors import UnsupportedError
from tests.adapters.trl.support import build, enabled

RELEASES = r"Expected what TRL 1\.0\.0 to 1\.16 have; pip install 'trl==1\.16\.\*'"
GROUPS = {
    "enable": (upstream.check, upstream._NAMES),
    "calibrate": (upstream.check_scorer, upstream._OF_SCORERS),
    "diffusion": (upstream.check_diffusion, upstream._OF_DIFFUSION),
}
REQUIRED = [(check, name) for check, names in GROUPS.values() for name in names if not name.is_optional]
GRPO = [*upstream._ONLINE, *upstream._LOSS_OF_GRPO, *upstream._ROUTER_LOSS]


def of_trl(function: Callable[..., Any]) -> Any:
    """The function, as if it were a method in a module of TRL."""
    return types.FunctionType(function.__code__, vars(grpo_trainer))


def of_other_parameters(self: Any, model: Any, ids: Any, attention_mask: Any, logits_to_keep: Any) -> None: ...


def of_another_order(
    self: Any, model: Any, attention_mask: Any, input_ids: Any, logits_to_keep: Any, compute_entropy: Any = False
) -> None: ...


def of_any_parameters(self: Any, model: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture(scope="module")
def trainers(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("output")
    kinds = {"grpo": (TreeGRPOTrainer, TreeGRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    return {name: build(model, folder, *kind) for name, kind in kinds.items()}


@pytest.fixture
def nothing_said() -> Iterator[None]:
    say_if_untested.cache_clear()
    yield
    say_if_untested.cache_clear()


@pytest.mark.parametrize("group", GROUPS)
def test_the_installed_release_passes(group: str) -> None:
    check, _ = GROUPS[group]
    check()
    with enabled():
        check()


@pytest.mark.parametrize(("check", "name"), REQUIRED, ids=[f"{c.__name__} {n.path}" for c, n in REQUIRED])
def test_what_is_missing_is_named(check: Callable[[], None], name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(name, monkeypatch)
    with pytest.raises(UnsupportedError) as error:
        check()
    message = str(error.value)
    assert f"{name.path} is missing" in message
    assert metadata.version(name.package) in message and "pip install" in message


def remove(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class that has it, so that no base has it either."""
    module, _, path = name.path.partition(":")
    owner: Any = __import__(module, fromlist=["_"])
    *owners, last = path.split(".")
    if owners[-1:] == ["_execution_engine"]:  # an object of C++, whose attributes cannot be taken away
        monkeypatch.setattr(f"{module}.{owners[0]}._execution_engine", object())
        return
    for part in owners:
        owner = getattr(owner, part)
    for holder in owner.__mro__ if inspect.isclass(owner) and not name.is_own else [owner]:
        if last in vars(holder):
            monkeypatch.delattr(holder, last)


def test_an_optional_name_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("trl.trainer.utils.add_fused_lm_head", raising=False)
    monkeypatch.delattr(transformers.Trainer, "_defer_fsdp_gradient_reduction", raising=False)
    upstream.check()
    upstream.check_scorer()


@pytest.mark.parametrize(
    ("function", "objection"),
    [
        (of_other_parameters, "has no parameter input_ids, compute_entropy"),
        (
            of_another_order,
            "has its parameters model, input_ids, attention_mask, logits_to_keep, compute_entropy in another order",
        ),
    ],
)
def test_other_parameters_are_named(
    function: Callable[..., Any], objection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RLOOTrainer, HOOK, of_trl(function))
    before = vars(GRPOTrainer)[HOOK]
    with pytest.raises(UnsupportedError, match=f"trl:RLOOTrainer.{HOOK} {objection}. {RELEASES}"):
        dta_plugin.enable()
    assert vars(GRPOTrainer)[HOOK] is before, "nothing is patched"


def test_a_method_of_a_base_is_not_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Trainer has a method of the same name, which has no generation buffer."""
    monkeypatch.delattr(GRPOTrainer, PREPARE)
    assert hasattr(GRPOTrainer, PREPARE)
    with pytest.raises(UnsupportedError, match=f"trl:GRPOTrainer.{PREPARE} is missing. {RELEASES}"):
        dta_plugin.enable()


def test_what_takes_anything_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL 1.14 has it, and what somebody else has put in the place of TRL's."""
    monkeypatch.setattr(GRPOTrainer, HOOK, of_trl(of_any_parameters))
    monkeypatch.setattr(RLOOTrainer, HOOK, of_other_parameters)
    upstream.check()


def test_what_a_framework_needs_is_not_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dta_framework.py").write_text("import dta_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    require([Name("trl.no_such_module:name", is_optional=True)])
    with pytest.raises(UnsupportedError, match=r"trl\.no_such_module:name is missing"):
        require([Name("trl.no_such_module:name")])
    with pytest.raises(ModuleNotFoundError, match="dta_not_installed"):
        require([Name("dta_framework:name", is_optional=True)])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_trainer_passes(trainers: dict[str, Any], kind: str) -> None:
    upstream.check_trainer(trainers[kind])
    upstream.check_offline_trainer(trainers[kind])
    upstream.check_diffusion_trainer(trainers["grpo"])


@pytest.mark.parametrize("attribute", GRPO)
def test_an_attribute_that_is_gone_is_named(
    attribute: str, trainers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trainers["grpo"], attribute)
    with pytest.raises(UnsupportedError, match=f"TreeGRPOTrainer has no {attribute}. {RELEASES}"):
        upstream.check_trainer(trainers["grpo"])


def test_attributes_that_came_later_are_not_asked_for(
    trainers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute in ("aux_loss_enabled", "use_adaptive_entropy", "_entropy_bonus_enabled"):
        monkeypatch.delattr(trainers["grpo"], attribute)
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.6.0" if name == "trl" else own(name))
    upstream.check_trainer(trainers["grpo"])
    monkeypatch.setattr(metadata, "version", lambda name: "1.7.0" if name == "trl" else own(name))
    with pytest.raises(UnsupportedError, match=r"TRL 1\.7\.0 .* TreeGRPOTrainer has no aux_loss_enabled"):
        upstream.check_trainer(trainers["grpo"])


def test_a_trainer_is_checked_at_its_first_use(trainers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainers["grpo"]
    monkeypatch.delitem(vars(trainer), "_dta_state", raising=False)
    monkeypatch.delattr(trainer, "_step")
    with pytest.raises(UnsupportedError, match="has no _step"):
        trainer._prepare_inputs([])


@pytest.mark.usefixtures("nothing_said")
def test_a_newer_release_is_said_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.19.0" if name == "trl" else own(name))
    with enabled(), enabled(prune="never"):
        build(model, tmp_path, GRPOTrainer, GRPOConfig, max_steps=1).train()
    warnings = [record for record in caplog.records if "newer than what was tested" in record.message]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    assert "TRL 1.19.0" in warnings[0].message and "transformers" not in warnings[0].message
