"""The plugin in a trainer's process: `one_step_off_policy` is reached, and wrong options end a run before it loads.

Trainers are verl's own classes with everything but workers and rollouts; a process of its own shows what verl imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl.plugin", reason="verl 0.9, which has entry points, is not installed")

from omegaconf import OmegaConf

from dta_plugin.adapters.verl_plugin import balance, reach, trainers, upstream
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.adapters.verl.batches import in_random_order, star_rows, trainer
from tests.adapters.verl.entry_points import REPOSITORY, written_to
from tests.adapters.verl.test_balance import balanced

SCRIPT = "tests.adapters.verl.separate_trainers_script"


def run_script(
    folder: Path, *overrides: str, kind: str = "one_step_off", plugins: str = "auto"
) -> subprocess.CompletedProcess[str]:
    """A process with the entry points that pip would write. plugins: those that verl is allowed to import."""
    return subprocess.run(
        [sys.executable, "-m", SCRIPT, kind, *overrides],
        cwd=REPOSITORY,
        env=os.environ
        | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{written_to(folder)}", reach.EXTERNAL_PLUGINS: plugins},
        capture_output=True,
        text=True,
        timeout=300,
    )


def numbers(output: str) -> dict[str, float]:
    pairs = (line.removeprefix("metric ").split(" ") for line in output.splitlines() if line.startswith("metric dta/"))
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("kind", ["one_step_off", "fully_async"])
def test_groups_are_placed_as_v1_does(kind: str, tmp_path: Path) -> None:
    """2 ranks: the trainer's own way to its next batch, in a process where nothing else has imported the plugin."""
    done = run_script(tmp_path, kind=kind)
    assert done.returncode == 0, done.stderr[-3000:]
    found = numbers(done.stdout)
    rows = star_rows(16, 4, prompt=60, median=40)
    try:
        balanced("v1", rows, metrics := {}, trainer("v1", 2, mini_batch=8, n=4))
    finally:
        balance.uninstall()
    assert found["dta/groups_split"] == metrics["dta/groups_split"] == 0
    assert found["dta/token_reduction_of_shares"] == metrics["dta/token_reduction_of_shares"] > 1.3
    assert found == pytest.approx({name: value for name, value in metrics.items() if name.startswith("dta/")})
    said = done.stderr + done.stdout
    assert "groups split: 0" in said and "not verl's own" not in said


def test_one_step_off_without_an_entry_point(tmp_path: Path) -> None:
    """Negative control: no other way reaches that process."""
    done = run_script(tmp_path, plugins="none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not numbers(done.stdout) and "metric global_seqlen" in done.stdout


@pytest.mark.slow
def test_a_run_that_does_not_name_the_plugin(tmp_path: Path) -> None:
    done = run_script(tmp_path, "actor_rollout_ref.model.external_lib=null")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not numbers(done.stdout) and "plugin imported: False" in done.stdout


def test_a_wrong_option_ends_one_step_off_before_it_starts(tmp_path: Path) -> None:
    done = run_script(tmp_path, "+actor_rollout_ref.rollout.custom.dta.exeutor=packed")
    assert done.returncode != 0
    assert "Unknown option(s) exeutor" in done.stderr and "resource pools" not in done.stdout


class _Started(Exception):
    """What would come next is the first worker."""


def _config(
    options: dict[str, Any], actor: str = "fsdp2", ref: str = "fsdp2", kl: bool = True, critic: str | None = None
) -> Any:
    run = {
        "actor": {"strategy": actor, "use_kl_loss": kl},
        "ref": {"strategy": ref},
        "model": {"external_lib": reach.MODULE},
        "rollout": {"custom": {"dta": options}},
    }
    value = {"enable": critic is not None, "strategy": critic, "model": {"external_lib": None}}
    return OmegaConf.create({"actor_rollout_ref": run, "critic": value, "algorithm": {"use_kl_in_reward": False}})


def _start(config: Any, module: str) -> None:
    """The method that `_prepared` extends, on a class of a module's own, with a start of workers that would be seen."""

    def start(self: Any) -> None:
        raise _Started

    kind, method = upstream.BEFORE_MODELS[module]
    prepared = trainers._prepared(start)
    one = type(kind, (), {method: prepared, "_balance_batch": lambda self, batch, metrics: None})()
    one.config, one.use_critic = config, config.critic.enable
    getattr(one, method)()


@pytest.mark.parametrize("module", upstream.BEFORE_MODELS)
def test_trainers_check_before_their_first_worker(module: str) -> None:
    with pytest.raises(_Started):
        _start(_config({"executor": "packed"}), module)
    with pytest.raises(InvalidInputError, match=r"Unknown option.* exeutor"):
        _start(_config({"exeutor": "packed"}), module)


@pytest.mark.parametrize("module", upstream.BEFORE_MODELS)
def test_verls_trainers_have_the_method(module: str) -> None:
    kind, method = upstream.BEFORE_MODELS[module]
    trainers.watch()
    found = getattr(getattr(pytest.importorskip(module), kind), method)
    assert hasattr(found, "_dta_stock") and not hasattr(found._dta_stock, "_dta_stock")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (_config({}, actor="veomni"), UnsupportedError, "actor.strategy=veomni. Expected fsdp or fsdp2 or megatron"),
        (_config({}, ref="veomni"), UnsupportedError, "ref.strategy=veomni"),
        (_config({"executor": "streamed"}, actor="fsdp"), InvalidInputError, "strategy=fsdp2"),
        (_config({"balance_ranks": "always"}), InvalidInputError, "balance_ranks='always' does nothing with verl"),
        (_config({"diffusion": {"no_such": 1}}), InvalidInputError, "no_such"),
    ],
)
def test_what_is_checked(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _start(config, upstream.V1)


def test_what_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    for config in (
        _config({}, actor="megatron", ref="megatron"),
        _config({"use_dta": False}, actor="veomni"),
        _config({}, ref="veomni", kl=False),  # no reference
        _config({"on_unsupported": "dense"}, actor="veomni"),
    ):
        with caplog.at_level("INFO", logger="dta_plugin"), pytest.raises(_Started):
            _start(config, upstream.V1)
    assert caplog.text.count("verl's own path: actor_rollout_ref.actor.strategy=veomni") == 1


def test_a_critic_gets_the_plugin_from_the_actor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its model's settings, which go to its worker; the driver says so where it runs dense."""
    entry_points = [SimpleNamespace(name=reach.ENTRY_POINT)]
    monkeypatch.setattr(reach, "entry_points", lambda group: entry_points)
    monkeypatch.delenv(reach.EXTERNAL_PLUGINS, raising=False)

    def named(config: Any) -> bool:
        with caplog.at_level("INFO", logger="dta_plugin"), pytest.raises(_Started):
            _start(config, upstream.V1)
        return reach.names_plugin(config.critic.model.external_lib)

    other = _config({}, critic="fsdp2")
    other.critic.model.external_lib = "json"
    assert named(_config({}, critic="fsdp2")) and named(other) and "json" in other.critic.model.external_lib
    assert not named(_config({})) and not named(_config({"use_dta": False}, critic="fsdp2"))
    assert "the critic runs dense" not in caplog.text
    assert not named(_config({}, critic="megatron"))
    assert "the critic runs dense, and counts as such" in caplog.text and "critic.strategy=megatron" in caplog.text
    entry_points.clear()
    assert not named(_config({}, critic="fsdp2"))
    assert "not an installed package" in caplog.text


def test_a_critics_worker_imports_it_before_it_chooses_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(trainers, "import_module", imported.append)

    class TrainingWorker:
        def __init__(self, config: Any) -> None:
            self.seen = list(imported)

    module: Any = SimpleNamespace(TrainingWorker=TrainingWorker)
    for _ in range(2):
        trainers._extend_workers(module)
    for external_lib, expected in ((None, []), (["json", reach.MODULE], [reach.MODULE])):
        model = SimpleNamespace(external_lib=external_lib)
        assert TrainingWorker(SimpleNamespace(model_config=model)).seen == expected


def test_workers_say_where_no_trainer_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.experimental.separation.engine_workers import DetachActorWorker
    from verl.workers.engine_workers import ActorRolloutRefWorker

    point = SimpleNamespace(name=reach.ENTRY_POINT)
    for found, plugins, modules, reason in (
        ([point], "auto", "", None),
        ([point], "other, dta_plugin", "", None),
        ([], "auto", reach.MODULE, None),
        ([], "auto", "", "not an installed package"),
        ([point], "none", "", "VERL_USE_EXTERNAL_PLUGINS=none leaves it out"),
    ):
        monkeypatch.setattr(reach, "entry_points", lambda group, found=found: found)
        monkeypatch.setenv(reach.EXTERNAL_PLUGINS, plugins)
        monkeypatch.setenv(reach.EXTERNAL_MODULES, modules)
        said = reach.unreached_separate_trainer(DetachActorWorker)
        assert said is None if reason is None else reason in said
        assert reach.unreached_separate_trainer(ActorRolloutRefWorker) is None


def test_a_subclass_with_an_order_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Its rows go through it, then into an order that keeps groups whole; a class that only inherits is left alone."""
    rows = in_random_order(star_rows(16, 4, prompt=60, median=40))
    one = trainer("v0", 2, mini_batch=8, n=4)
    seen: list[int] = []

    class Own(type(one)):
        def _balance_batch(self, batch: Any, metrics: Any) -> None:
            seen.append(len(batch))

    class Heir(type(one)):
        pass

    try:
        balance.install_in(Heir)
        assert "_balance_batch" not in vars(Heir)
        for _ in range(2):
            balance.install_in(Own)
        one.__class__ = Own
        with caplog.at_level("INFO", logger="dta_plugin"):
            balanced("v0", rows, metrics := {}, one)
    finally:
        balance.uninstall()
    assert seen == [64] and metrics["dta/groups_split"] == 0
    assert "Own._balance_batch is not verl's own" in caplog.text
