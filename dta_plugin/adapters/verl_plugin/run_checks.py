"""A run's options and strategies against each other: on the driver before models load, and in workers as they do."""

from __future__ import annotations

import logging
from typing import Any

from dta_plugin.adapters.verl_plugin.config import DIFFUSION, KEY, check_places, fall_back, tree_config
from dta_plugin.adapters.verl_plugin.reach import no_entry_point
from dta_plugin.config import TreeConfig
from dta_plugin.decline import decline
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.training.notices import Notices, say

STRATEGIES = ("fsdp", "fsdp2")
MEGATRON = "megatron"
OF_POLICIES = (*STRATEGIES, MEGATRON)


def check_run(config: Any) -> None:
    """config: of a PPO run, a DictConfig.

    Raises InvalidInputError for wrong options and those in a wrong place, and UnsupportedError for settings of verl
    that they do not go with.
    """
    from verl.trainer.ppo.utils import need_reference_policy

    from dta_plugin.adapters.verl_plugin.diffusion.guards import check_path
    from dta_plugin.adapters.verl_plugin.diffusion.worker import diffusion_settings

    check_places(config, KEY)
    run = config.actor_rollout_ref
    options, diffusion = tree_config(run.rollout), diffusion_settings(run)
    if options is None and diffusion is None:
        return
    if diffusion is not None:
        check_path(run.model.path)
    for role in ("actor", "ref") if need_reference_policy(config) else ("actor",):
        strategy = run[role].strategy
        if strategy not in (OF_POLICIES if diffusion is None else STRATEGIES):
            refuse_strategy(options, f"actor_rollout_ref.{role}.strategy={strategy}")
        elif options is not None:
            check_strategy(options, strategy)


def has_tree_critic(config: Any) -> bool:
    """Whether the critic of a PPO run that has one is to run as a tree; says so where it is to, and cannot."""
    if tree_config(config.actor_rollout_ref.rollout) is None:
        return False
    reason = critic_obstacle(config)
    if reason is not None:
        say(f"the critic runs dense, and counts as such where rows are dealt out to ranks: {reason}", logging.WARNING)
    return reason is None


def critic_obstacle(config: Any) -> str | None:
    """What keeps the critic of a PPO run from being a tree."""
    strategy = config.critic.strategy
    if strategy not in STRATEGIES:
        return f"critic.strategy={strategy}; {' or '.join(STRATEGIES)} run trees"
    return no_entry_point()


def refuse_strategy(
    config: TreeConfig | None,
    found: str,
    settings: str = "actor_rollout_ref.actor.strategy, .ref.strategy",
    key: str = KEY,
) -> None:
    """Raise UnsupportedError, or say that verl's own path runs, where all tokens are trained on and options allow it.

    config: None for a diffusion LM. settings: where the strategy is set. key: where the command has
    the options.
    """
    expected = " or ".join(STRATEGIES if config is None else OF_POLICIES)
    reason = f"{found}. Expected {expected} on this machine's own kind of device ({settings})"
    if config is None:
        raise UnsupportedError(f"{DIFFUSION} is not available: {reason}.")
    if config.selection():
        raise UnsupportedError(
            f"Prefix-tree execution is not available: {reason}; or leave token_selection={config.token_selection} out."
        )
    say(f"verl's own path: {decline(reason, config.on_unsupported, fall_back(key)).reason}")


def take_own_path(found: str | UnsupportedError, config: TreeConfig, notices: Notices, key: str) -> None:
    """Raise UnsupportedError, or say once that verl's own path runs a mini-batch, as `on_unsupported` has it.

    key: where the command has the options.
    """
    reason = decline(found, config.on_unsupported, fall_back(key)).reason
    notices.say_once(f"verl's own path: {reason}", level=logging.WARNING)


def saves_enough(saving: float, config: TreeConfig, notices: Notices) -> bool:
    """Whether a mini-batch saves what `min_saving` asks for; says once where it does not. saving: a share of FLOPs."""
    if saving < config.min_saving:
        saved = f"{saving:.0%} of FLOPs saved, min_saving {config.min_saving:.0%}"
        notices.say_once(f"verl's own path: only {saved}", "min_saving")
    return saving >= config.min_saving


def check_strategy(config: TreeConfig, strategy: str) -> None:
    """Raises InvalidInputError where a strategy is asked for what it cannot do: chunks, or a check of log-probs."""
    is_asked = config.executor == "streamed" or config.max_tree_tokens_per_chunk
    if is_asked and strategy in ("fsdp", MEGATRON):
        raise InvalidInputError(
            f"Got executor=streamed or max_tree_tokens_per_chunk with strategy={strategy}, which cannot run a "
            "micro-batch in chunks. Expected actor_rollout_ref.actor.strategy=fsdp2 (and .ref.strategy); or bound "
            "memory with ppo_max_token_len_per_gpu, which counts tree tokens."
        )
    if config.on_nonfinite == "error" and strategy == MEGATRON:
        raise InvalidInputError(
            "Got on_nonfinite=error with strategy=megatron, where log-probs go to verl's loss as they are. Leave it "
            "out."
        )
