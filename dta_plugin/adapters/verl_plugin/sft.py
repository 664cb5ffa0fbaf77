"""verl's SFT trainer: options from its command, `+dta.<field of TreeConfig>=<value>`, and `dta/*` metrics as numbers.

    torchrun ... -m verl.trainer.sft_trainer ... model.external_lib=dta_plugin.adapters.verl +dta.executor=packed

The trainer hands a worker its model and its engine, and no more: options are read from the Hydra command of the
process. Workers of `sft_trainer_ray` are processes of their own, with the defaults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dta_plugin.adapters.verl_plugin.config import check_places, checked_options
from dta_plugin.config import TreeConfig

KEY = "dta"


def options_of_command() -> TreeConfig | None:
    """Of the SFT command that this process runs: None where they leave verl's own path in place (`+dta.use_dta=false`).

    The defaults in other processes. Raises InvalidInputError for wrong options and those in a wrong place.
    """
    command = _command()
    check_places(command, KEY)
    found = command.get(KEY)
    return checked_options({} if found is None else OmegaConf.to_container(found, resolve=True), KEY)


def command_has_options() -> bool:
    """Whether this process's command has some, read or not."""
    from hydra.core.hydra_config import HydraConfig

    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(override.lstrip("+").startswith(f"{KEY}.") for override in given)


def is_command() -> bool:
    """Whether this process runs an SFT command."""
    return bool(_command())


def as_numbers(train_batch: Callable[..., Any]) -> Callable[..., Any]:
    """`TrainingWorker.train_batch`; the SFT trainer logs what it returns, metrics of all ranks as they are."""

    @functools.wraps(train_batch)
    def wrapped(worker: Any, *args: Any, **kwargs: Any) -> Any:
        output = train_batch(worker, *args, **kwargs)
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import Metric
        from verl.workers.utils.losses import sft_loss

        if output is not None and getattr(worker.loss_fn, "func", worker.loss_fn) is sft_loss:
            metrics = tu.get(output, "metrics")
            for name, value in metrics.items():
                if name.startswith("dta/"):
                    metrics[name] = Metric.aggregate_dp(value if isinstance(value, list) else [value])
        return output

    return wrapped


def _command() -> DictConfig:
    """The configuration of this process's Hydra command; empty without one, and in a PPO run."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    if not (HydraConfig.initialized() and GlobalHydra.instance().is_initialized()):
        return OmegaConf.create()
    command = HydraConfig.get()
    found = compose(command.job.config_name, overrides=list(command.overrides.task))
    is_ppo = "actor_rollout_ref" in found and "engine" not in found  # Hydra's `+` may add the former to any
    return OmegaConf.create() if is_ppo else found
