"""What importing `dta_plugin.adapters.verl` does to a process. Each part waits until verl imports what it extends.

Workers: engine classes, for FSDP and, where Megatron is installed, for Megatron, are registered under this machine's
device and vendor, where verl looks before it takes its own; `ActorRolloutRefWorker` tells its engines the options; the
`prepare_micro_batches` of engine modules takes micro-batches that our engine has planned. Task runner:
`balance.install()`, after a trainer module has been imported.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import dta_plugin
from dta_plugin.adapters.imports import when_imported
from dta_plugin.adapters.verl_plugin import trainers
from dta_plugin.adapters.verl_plugin.reach import checked_version, unreached_trainer
from dta_plugin.adapters.verl_plugin.run_checks import MEGATRON
from dta_plugin.adapters.verl_plugin.upstream import (
    ENGINE,
    MEGATRON_ENGINE,
    TRAINERS,
    WORKERS,
    check_engine_module,
    check_megatron_modules,
    check_trainer_module,
    check_worker_module,
)
from dta_plugin.errors import UnsupportedError
from dta_plugin.training.notices import say

_BALANCE = "dta_plugin.adapters.verl_plugin.balance"
_OUR_ENGINE = "dta_plugin.adapters.verl_plugin.engine"
_OUR_CRITIC = "dta_plugin.adapters.verl_plugin.critic"
_OUR_MEGATRON = "dta_plugin.adapters.verl_plugin.megatron.engine"

_installed = False


def install() -> None:
    """Turn the plugin on in this process. Idempotent. Raises UnsupportedError for a verl that is not supported."""
    global _installed
    if _installed:
        return
    found = checked_version()
    when_imported(_OUR_ENGINE, _register_engine)
    when_imported(_OUR_CRITIC, _register_critic)
    when_imported(ENGINE, _import_our_engines)
    when_imported(MEGATRON_ENGINE, _import_our_megatron_engine)
    when_imported(WORKERS, _pass_options_on)
    trainers.watch()
    balances = find_spec(_BALANCE) is not None
    if balances:
        for trainer in TRAINERS:
            when_imported(trainer, _balance)
    _installed = True
    extended = ["FSDP engines for language and value models", "options of ActorRolloutRefWorker"]
    unreached = unreached_trainer(found)
    if balances and unreached is None:
        extended.append("balancing of PPO trainers")
    line = f"dta-plugin {dta_plugin.__version__} for verl {found}, process {os.getpid()}: extends {', '.join(extended)}"
    if unreached is None:
        say(line)
    else:
        say(f"{line}; ranks get the rows that verl deals out: {unreached}", logging.WARNING)


def _import_our_engines(_: ModuleType) -> None:
    check_engine_module()
    for ours in (_OUR_ENGINE, _OUR_CRITIC):
        import_module(ours)  # it may have begun this import, and goes on after it


def _import_our_megatron_engine(theirs: ModuleType) -> None:
    """verl imports its engine wherever Megatron is installed; a run that does not use it goes on without ours."""
    from dta_plugin.adapters.verl_plugin.registry import follow_plans, register

    try:
        check_megatron_modules()
    except UnsupportedError as error:
        say(f"no trees with strategy=megatron: {error}", logging.WARNING)
        return
    register("language_model", import_module(_OUR_MEGATRON).TreeMegatronEngine, (MEGATRON,))
    follow_plans(theirs)


def _register_engine(module: ModuleType) -> None:
    from dta_plugin.adapters.verl_plugin.registry import extend_functions, register

    register("language_model", module.TreeEngine)
    extend_functions()


def _register_critic(module: ModuleType) -> None:
    from dta_plugin.adapters.verl_plugin.registry import register

    register("value_model", module.TreeCriticEngine)


def _pass_options_on(module: ModuleType) -> None:
    from dta_plugin.adapters.verl_plugin.sft import as_numbers
    from dta_plugin.adapters.verl_plugin.workers import passing_options_on, passing_sft_options_on

    check_worker_module()
    worker = module.ActorRolloutRefWorker
    worker.set_dispatch_collect = passing_options_on(worker.set_dispatch_collect)
    one_engine = module.TrainingWorker
    one_engine.__init__ = passing_sft_options_on(one_engine.__init__)
    one_engine.train_batch = as_numbers(one_engine.train_batch)


def _balance(module: ModuleType) -> None:
    check_trainer_module(module)
    import_module(_BALANCE).install()
