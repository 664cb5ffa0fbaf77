"""Settings that Hydra takes and nothing reads: options in a wrong place, a wrong module, an engine without trees."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl.plugin", reason="verl 0.9, which has entry points, is not installed")

from omegaconf import OmegaConf

from dta_plugin.adapters.verl_plugin import reach, sft, trainers, upstream, workers
from dta_plugin.adapters.verl_plugin.config import KEY, check_places
from dta_plugin.adapters.verl_plugin.run_checks import take_own_path
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.training.notices import Notices
from tests.adapters.verl.test_sft import PLUGIN, run
from tests.adapters.verl.test_trainers import _config, _start, _Started


def _with(config: Any, place: str) -> Any:
    return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{place}.verify=first"]))


@pytest.mark.parametrize("place", ["dta", "actor_rollout_ref.dta", "actor_rollout_ref.actor.dta", "trainer.dta"])
@pytest.mark.parametrize("module", upstream.BEFORE_MODELS)
def test_options_in_a_wrong_place_of_a_ppo_run(place: str, module: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"options in {place}, where .* Expected \+{KEY}.<option>"):
        _start(_with(_config({}), place), module)
    with pytest.raises(_Started):
        _start(_with(_config({}), KEY), module)


def test_places_of_an_sft_run() -> None:
    check_places(OmegaConf.create({"dta": {"verify": "first"}, "engine": {"missing": "???"}}), sft.KEY)
    with pytest.raises(
        InvalidInputError, match=rf"options in {KEY}, where nothing reads them. Expected \+dta.<option>"
    ):
        check_places(_with(OmegaConf.create(), KEY), sft.KEY)


@pytest.mark.parametrize(
    "named", ["dta_plugin", ["json", "dta_plugin.adapters.trl"], "dta_plugin.adapters.verl_plugin"]
)
def test_a_module_that_turns_nothing_on(named: Any) -> None:
    """In the settings of a PPO run, and in those of a worker, which an SFT run has in its own process."""
    config = _config({})
    config.actor_rollout_ref.model.external_lib = named
    with pytest.raises(InvalidInputError, match=f"which does not turn prefix trees on. Expected .*{reach.MODULE}"):
        _start(config, upstream.V1)

    class TrainingWorker:
        def __init__(self, config: Any) -> None:
            raise AssertionError("an engine would be chosen")

    trainers._extend_workers(module := SimpleNamespace(TrainingWorker=TrainingWorker))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="does not turn prefix trees on"):
        module.TrainingWorker(SimpleNamespace(model_config=SimpleNamespace(external_lib=named)))


def test_modules_that_are_meant() -> None:
    for named in (None, "json", reach.MODULE, ["dta_plugin", reach.MODULE], "dta_plugin.adapters.verl_cpu"):
        reach.check_names(named)


def test_options_without_the_plugin(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(trainers.sys.modules, reach.MODULE)
    for options in ({}, {"verify": "first"}):
        config = _config(options)
        config.actor_rollout_ref.model.external_lib = None
        with caplog.at_level(logging.WARNING, logger="dta_plugin"), pytest.raises(_Started):
            _start(config, upstream.V1)
        assert bool(options) == (f"there are options in {KEY}, but no external_lib={reach.MODULE}" in caplog.text)


class _Worker:
    """Of an SFT run, with an engine of somebody else's."""

    def __init__(self, kind: str) -> None:
        self.config, self.engine = SimpleNamespace(model_type=kind), object()
        self.engine_config = SimpleNamespace(strategy="torchtitan")


def test_an_sft_engine_without_trees(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    init = workers.passing_sft_options_on(_Worker.__init__)

    def start(options: dict[str, Any], kind: str = "language_model") -> None:
        monkeypatch.setattr(sft, "_command", lambda: OmegaConf.create({"engine": {}, "dta": options}))
        init(_Worker.__new__(_Worker), kind)

    message = r"strategy 'torchtitan' runs in object. Expected fsdp or fsdp2 or megatron .*\(engine.strategy\)"
    with pytest.raises(UnsupportedError, match=message):
        start({})
    start({}, "value_model")
    start({"use_dta": False})
    assert not caplog.text
    with caplog.at_level(logging.INFO, logger="dta_plugin"):
        start({"on_unsupported": "dense"})
    assert "verl's own path: strategy 'torchtitan'" in caplog.text


def test_a_refusal_names_the_options_of_its_own_command() -> None:
    for key in (KEY, sft.KEY):
        with pytest.raises(UnsupportedError, match=rf"so it is; or \+{key}.on_unsupported=dense"):
            take_own_path("so it is", TreeConfig(), Notices(), key)


def test_an_sft_command_with_the_options_of_ppo(folder: Path, tmp_path: Path) -> None:
    done, _ = run(tmp_path / "ppo", folder, PLUGIN, f"+{KEY}.verify=first")
    assert done.returncode != 0 and f"Got options in {KEY}, where nothing reads them" in done.stderr


@pytest.mark.slow
def test_an_sft_command_without_the_plugin(folder: Path, tmp_path: Path) -> None:
    done, found = run(tmp_path / "off", folder, "+dta.verify=first")
    assert done.returncode == 0 and len(found) == 3
    assert "there are options in dta, but no external_lib" in done.stdout + done.stderr
