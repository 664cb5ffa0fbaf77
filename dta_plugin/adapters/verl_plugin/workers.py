"""How a worker's engines get at the plugin's options, which verl keeps in the rollout's configuration."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from dta_plugin.adapters.verl_plugin.config import tree_config
from dta_plugin.adapters.verl_plugin.protocols import TreePolicyEngine, Worker
from dta_plugin.adapters.verl_plugin.reach import unreached_separate_trainer
from dta_plugin.adapters.verl_plugin.run_checks import refuse_strategy
from dta_plugin.adapters.verl_plugin.sft import KEY, is_command, options_of_command
from dta_plugin.adapters.verl_plugin.upstream import check_worker
from dta_plugin.training.notices import say


def passing_options_on(set_dispatch_collect: Callable[..., None]) -> Callable[..., None]:
    """`ActorRolloutRefWorker.set_dispatch_collect`, which a worker calls for each engine that it has built.

    The engines then know their options. Raises InvalidInputError for wrong ones, and UnsupportedError for a
    strategy that the plugin has no engine for, unless ``on_unsupported="dense"`` and all tokens are to be trained on.
    """

    @functools.wraps(set_dispatch_collect)
    def wrapped(worker: Worker, *args: Any, **kwargs: Any) -> None:
        set_dispatch_collect(worker, *args, **kwargs)
        from dta_plugin.adapters.verl_plugin import critic
        from dta_plugin.adapters.verl_plugin.diffusion.worker import diffusion_settings

        check_worker(worker)
        unreached = unreached_separate_trainer(type(worker))
        if unreached is not None:
            say(f"ranks get the rows that verl deals out: {unreached}", logging.WARNING)
        config, diffusion = tree_config(worker.config.rollout), diffusion_settings(worker.config)
        critic.configure(config)
        for part in (part for part in (worker.actor, worker.ref) if part is not None):
            engine = part.engine
            if isinstance(engine, TreePolicyEngine):
                engine.configure(config, diffusion)
            elif config is not None or diffusion is not None:
                refuse_strategy(config, f"strategy {part.engine_config.strategy!r} runs in {type(engine).__name__}")

    return wrapped


def passing_sft_options_on(init: Callable[..., None]) -> Callable[..., None]:
    """`TrainingWorker.__init__`: an engine knows the options of an SFT command before its model is built.

    Raises InvalidInputError for wrong ones, and UnsupportedError as `passing_options_on` does.
    """

    @functools.wraps(init)
    def wrapped(worker: Any, *args: Any, **kwargs: Any) -> None:
        options = options_of_command()
        init(worker, *args, **kwargs)
        if isinstance(worker.engine, TreePolicyEngine):
            worker.engine.configure_early(options, KEY)
        elif options is not None and worker.config.model_type == "language_model" and is_command():
            found = f"strategy {worker.engine_config.strategy!r} runs in {type(worker.engine).__name__}"
            refuse_strategy(options, found, "engine.strategy", KEY)

    return wrapped
