"""One setting turns the plugin on: what an import does to a process, and how options reach an engine."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed: pip install 'dta-plugin[verl]'")

from omegaconf import OmegaConf

from dta_plugin.adapters.verl_plugin import reach
from dta_plugin.adapters.verl_plugin.config import tree_config
from dta_plugin.adapters.verl_plugin.workers import passing_options_on
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError

REPOSITORY = Path(__file__).parents[3]


def _run(code: str) -> str:
    """Output of a fresh process."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_one_line_and_everything_in_its_place() -> None:
    """The plugin comes first here and waits; with `external_lib` the worker module is there already."""
    out = _run(
        "import os, sys\n"
        "os.environ['VERL_USE_EXTERNAL_MODULES'] = 'dta_plugin.adapters.verl_cpu'\n"
        "from verl.utils.import_utils import import_external_libs\n"
        "for _ in range(2):\n"
        "    import_external_libs(['dta_plugin.adapters.verl'])\n"
        "import dta_plugin.adapters.verl_plugin.install as install\n"
        "install.install()\n"
        "assert 'verl.workers.engine' not in sys.modules and 'verl.workers.engine_workers' not in sys.modules\n"
        "from verl.workers.engine_workers import ActorRolloutRefWorker\n"
        "from verl.workers.engine import EngineRegistry\n"
        "print('patched', hasattr(ActorRolloutRefWorker.set_dispatch_collect, '__wrapped__'))\n"
        "for strategy in ('fsdp', 'fsdp2'):\n"
        "    print('engine', EngineRegistry.get_engine_cls('language_model', strategy).__name__)\n"
        "print('critic', EngineRegistry.get_engine_cls('value_model', 'fsdp').__name__)\n"
    )
    assert out.count("dta: dta-plugin ") == 1
    assert "patched True" in out
    assert out.count("engine TreeEngine") == 2
    assert "critic TreeCriticEngine" in out


@pytest.mark.parametrize("found", ["0.7.1", "0.10.0"])
def test_unsupported_versions_raise(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    with pytest.raises(UnsupportedError, match=f"verl {found} is installed. Expected 0.8.0 <= verl < 0.10"):
        reach.checked_version()


@pytest.mark.parametrize(
    ("found", "modules", "command", "reason"),
    [
        ("0.9.1", "", "main_ppo", None),
        ("0.8.0", "other,dta_plugin.adapters.verl", "main_ppo", None),
        ("0.8.0", "", "main_ppo", "export VERL_USE_EXTERNAL_MODULES=dta_plugin.adapters.verl as well"),
        ("0.8.0", "dta_plugin.adapters.verl", "main_ppo_sync", "run verl.trainer.main_ppo"),
    ],
)
def test_a_trainer_out_of_reach(
    found: str, modules: str, command: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", modules)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", f"verl.trainer.{command}"])
    said = reach.unreached_trainer(found)
    assert said is None if reason is None else reason in said


def _rollout(options: Any) -> Any:
    return OmegaConf.create({"name": "vllm", "custom": None if options is None else {"dta": options}})


def test_options() -> None:
    assert tree_config(_rollout(None)) == TreeConfig()
    assert tree_config(_rollout({})) == TreeConfig()
    options = {"executor": "packed", "min_saving": 0.1}
    assert tree_config(_rollout(options)) == TreeConfig(**options)
    assert tree_config(_rollout(options | {"use_dta": True})) == TreeConfig(**options)
    assert tree_config(_rollout({"use_dta": False})) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exeutor": "packed"}, "Unknown option.* exeutor.*Expected among: .*executor"),
        ({"executor": "fast"}, r"dta\.executor='fast'. Expected one of auto, packed, streamed"),
        ({"use_dta": "no"}, "use_dta='no'. Expected true or false"),
        ("packed", "custom.dta='packed'"),
        ({"merge_window": "always"}, "does nothing with verl: ppo_max_token_len_per_gpu"),
        ({"token_budget": 0.5}, "token_budget=0.5 does nothing with token_selection='all'"),
    ],
)
def test_wrong_options_raise(options: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        tree_config(_rollout(options))
    assert "actor_rollout_ref.rollout.custom.dta" in str(error.value)


class _Engine:
    """Not one of the plugin's."""


def _worker(options: Any, engine: Any) -> Any:
    part = SimpleNamespace(engine=engine, engine_config=SimpleNamespace(strategy="megatron"))
    return SimpleNamespace(config=SimpleNamespace(rollout=_rollout(options)), actor=part, ref=None)


def test_options_reach_the_engines() -> None:
    from tests.adapters.verl import support  # noqa: F401, I001 (the CPU platform comes first)
    from dta_plugin.adapters.verl_plugin.engine import TreeEngine

    class Engine(TreeEngine):
        def __init__(self) -> None:
            self.given: list[TreeConfig | None] = []

        def configure(self, config: TreeConfig | None, diffusion: object = None) -> None:
            self.given.append(config)

    called = []
    set_dispatch_collect = passing_options_on(lambda worker, **kwargs: called.append(kwargs))
    for options, expected in (({"verify": "first"}, TreeConfig(verify="first")), ({"use_dta": False}, None)):
        engine = Engine()
        set_dispatch_collect(_worker(options, engine), mesh_name="actor")
        assert engine.given == [expected]
    assert called == [{"mesh_name": "actor"}] * 2


def test_other_strategies_are_no_silent_no_op(caplog: pytest.LogCaptureFixture) -> None:
    set_dispatch_collect = passing_options_on(lambda worker: None)
    with pytest.raises(UnsupportedError, match="strategy 'megatron' runs in _Engine"):
        set_dispatch_collect(_worker({}, _Engine()))
    with caplog.at_level("INFO", logger="dta_plugin"):
        set_dispatch_collect(_worker({"on_unsupported": "dense"}, _Engine()))
    assert "verl's own path: strategy 'megatron'" in caplog.text
    with pytest.raises(UnsupportedError, match="strategy 'megatron'"):  # which would train on all tokens
        set_dispatch_collect(_worker({"on_unsupported": "dense", "token_selection": "rpc"}, _Engine()))
    set_dispatch_collect(_worker({"use_dta": False}, _Engine()))
