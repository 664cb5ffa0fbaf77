"""Importing a module changes nothing, but for the two that frameworks are told to import in order to be extended, and
the one that verl finds by itself.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

# In a fresh process: names of what is there before and after every module has been imported.
_CODE = """
import pkgutil, sys
from importlib import import_module
from importlib.util import find_spec

import dta_plugin
import transformers  # their own effects, such as its hooks on imports, come first
from transformers import AttentionInterface, Trainer
frameworks = [name for name in ("trl", "verl") if find_spec(name)]
classes = [Trainer]
if "trl" in frameworks:
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer
    classes += [GRPOTrainer, RLOOTrainer, SFTTrainer, DPOTrainer]
if "verl" in frameworks:
    import verl.workers.engine.fsdp.transformer_impl as engines
    from verl.trainer.ppo import core_algos
    from verl.workers import engine_workers
    from verl.workers.utils import losses
    classes += [engines, core_algos, losses, engine_workers.ActorRolloutRefWorker, engines.EngineRegistry]

def state():
    registry = dict(AttentionInterface().items())
    engine = repr(engines.EngineRegistry._engines) if "verl" in frameworks else None
    return [dict(vars(owner)) for owner in classes], registry, engine, len(sys.meta_path)

before = state()
entries = {"dta_plugin.adapters.verl", "dta_plugin.adapters.verl_cpu", "dta_plugin.adapters.verl_plugin.discovery"}
missing = {name for name in ("trl", "verl", "triton", "megatron") if not find_spec(name)}
count = 0
effect = EFFECT
modules = pkgutil.walk_packages(dta_plugin.__path__, "dta_plugin.", onerror=lambda name: None)
for module in () if effect else modules:
    path = module.name.split(".")
    if module.name in entries or path[-1] == "__main__" or "verl_cpu" in path:
        continue
    if any(name in part for name in missing for part in path[1:]):
        continue
    import_module(module.name)
    count += 1
exec(effect)
after = state()
same = [all(a.get(key) is b.get(key) for key in a | b) for a, b in zip(before[0], after[0])]
print(count, "modules;", all(same) and before[1:] == after[1:])
"""


def _said(effect: str) -> str:
    code = _CODE.replace("EFFECT", repr(effect))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_importing_changes_nothing() -> None:
    count, _, is_same = _said("").partition(" modules; ")
    assert is_same == "True" and int(count) > 130


@pytest.mark.long
def test_negative_control() -> None:
    """What turns the plugin on is seen."""
    entry = "import dta_plugin.adapters.verl" if find_spec("verl") else "dta_plugin.enable()"
    assert _said(entry).endswith("False")
