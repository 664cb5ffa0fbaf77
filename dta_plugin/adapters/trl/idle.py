"""What the flag does to a training, whoever trains: trees, shared prefixes, or one line about why neither.

`watch` stands in front of `transformers.Trainer.train`. A trainer without the log-prob hook shares prefixes while it
trains (`every_trainer`); where it cannot, the line comes before the training. After one in which no call ran as a tree
all the same, it says why. It raises only before a training, and only where no call of it could be a tree: a config with
the flag, given to a GRPO or RLOO trainer that does not know it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from dta_plugin.adapters.trl.config import tree_config
from dta_plugin.adapters.trl.every_trainer import by_hook, sharing_obstacle, sharing_while_it_trains
from dta_plugin.adapters.trl.origin import foreign_reader, has_our_hook, hook_of, is_async
from dta_plugin.adapters.trl.shared_prefixes import SharedPrefixesMixin
from dta_plugin.adapters.trl.state import TreeState, sharing_of
from dta_plugin.adapters.trl.summary import summed_up
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.training.notices import say

_process_config: TreeConfig | None = None
_trainings = 0
_front: Any = None  # what stands in front of Trainer.train
_is_sticky = False  # asked for by the config of a trainer, which `disable` does not take back


def watch() -> None:
    """Have trainings looked at from now on, for a config that carries the flag. Idempotent."""
    global _is_sticky
    _is_sticky = True
    _begin()


def expect_trees(config: TreeConfig | None) -> None:
    """What the process was enabled with, for trainers without the flag; None: they are stock again."""
    global _process_config, _front
    _process_config = config
    if config is not None:
        _begin()
    elif Trainer.train is _front and not _is_sticky:  # else somebody else's patch calls it, and it does nothing
        Trainer.train, _front = _front.__wrapped__, None  # type: ignore[method-assign]


def say_if_nothing_trained() -> None:
    """One line at the end of a script that was run with the flag and trained nothing."""
    if not _trainings:
        say(
            "use_dta did nothing: the script ended without a training by a trainer of transformers or TRL. Use one, or "
            "call dta_plugin.sequence_logprobs in a loop of your own.",
            logging.WARNING,
        )


def _begin() -> None:
    global _front
    if _front is None:
        _front = Trainer.train = _watched(Trainer.train)  # type: ignore[method-assign]


def _watched(train: Any) -> Any:
    @functools.wraps(train)
    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        global _trainings
        _trainings += 1
        _refuse_what_cannot_run(trainer)
        asked = tree_config(trainer.args) if hasattr(trainer.args, "use_dta") else _process_config
        if asked is None:
            return train(trainer, *args, **kwargs)
        if by_hook(trainer) or isinstance(trainer, SharedPrefixesMixin):
            with summed_up(trainer):
                result = train(trainer, *args, **kwargs)
        elif (obstacle := sharing_obstacle(trainer)) is not None:
            _say(trainer, f"use_dta does nothing for this {type(trainer).__name__}{_nor_draws(asked)}: {obstacle}")
            return train(trainer, *args, **kwargs)
        else:
            with sharing_while_it_trains(trainer, asked), summed_up(trainer):
                result = train(trainer, *args, **kwargs)
        if (reason := _idle_reason(trainer)) is not None:
            nothing = f"use_dta did nothing{_nor_draws(asked)}: no call of this training ran as a tree"
            _say(trainer, f"{nothing}, because {reason}")
        return result

    return watched


def _say(trainer: Trainer, message: str) -> None:
    if trainer.accelerator.is_main_process:
        say(message, logging.WARNING)


def _nor_draws(config: TreeConfig) -> str:
    return "" if config.picture is None else f", {config.picture} is not drawn"


def _refuse_what_cannot_run(trainer: Trainer) -> None:
    config = tree_config(trainer.args)
    if config is not None and config.on_unsupported == "error" and by_hook(trainer) and not has_our_hook(trainer):
        raise UnsupportedError(
            f"use_dta=True in the config of {type(trainer).__name__}, which does not know it. Expected "
            f"{_remedy(trainer)}; or use_dta=False."
        )


def _idle_reason(trainer: Trainer) -> str | None:
    """Why no call ran as a tree; None where one did."""
    state, sharing = TreeState.of(trainer), sharing_of(trainer)
    if (state and state.calls) or (sharing and sharing.shared_calls):
        return None
    if sharing is not None:
        return f"{sharing.reason}"
    if state is not None and state.why_dense is not None:
        return f"{state.why_dense}"
    if has_our_hook(trainer):
        why = foreign_reader(trainer) or f"{type(trainer).__name__} asked for no log-probs"
        return f"{why}; call super().{hook_of(trainer)}"
    return f"{type(trainer).__name__} does not know the flag; use {_remedy(trainer)}"


def _remedy(trainer: Trainer) -> str:
    """For a trainer whose log-probs the plugin computes."""
    if is_async(trainer):
        return "TreeAsyncGRPOTrainer (dta_plugin.adapters.trl.async_grpo), or dta_plugin.enable(), with TRL 1.16"
    known = "GRPOTrainer" if isinstance(trainer, GRPOTrainer) else "RLOOTrainer"
    remedy = f"Tree{known}, or dta_plugin.enable()"
    is_theirs = type(trainer) in (GRPOTrainer, RLOOTrainer)
    return f"{remedy} (dta_plugin.adapters.trl)" if is_theirs else f"{remedy} as its base"
