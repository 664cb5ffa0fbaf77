"""From a worker's configuration to what its engine is told about a diffusion LM."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from dta_plugin.adapters.verl_plugin.diffusion.guards import LENGTH_NORMS, check_settings, clip_range
from dta_plugin.adapters.verl_plugin.diffusion.options import diffusion_options
from dta_plugin.adapters.verl_plugin.diffusion.updates import Settings
from dta_plugin.diffusion.objectives.gdsd import clamp_range


def diffusion_settings(config: DictConfig) -> Settings | None:
    """config: `actor_rollout_ref`. None without diffusion options.

    Raises InvalidInputError for wrong options, UnsupportedError for settings of verl that do not fit.
    """
    options = diffusion_options(config.rollout)
    if options is None:
        return None
    check_settings(config, options.objective)
    actor, rollout = config.actor, config.rollout
    epsilon = clip_range(config)
    if options.objective == "gdsd":
        clamp_range(epsilon)
    else:
        options = replace(options, length_norm=LENGTH_NORMS[actor.loss_agg_mode])
    return Settings(
        options=options,
        max_length=rollout.response_length,
        epsilon=epsilon,
        rows_per_step=actor.ppo_mini_batch_size * rollout.n if actor.ppo_epochs == 1 else None,
    )
