"""A flag that did nothing says so: after a training in which no call ran as a tree, one line names what to use.

`watch` looks at what `transformers.Trainer.train` is called for and changes nothing. It raises only before a training,
and only where no call of it could be a tree: a config with the flag, given to a trainer that does not know it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from dta_plugin.adapters.trl.config import tree_config
from dta_plugin.adapters.trl.origin import foreign_reader, has_our_hook, hook_of
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.training.notices import say

_CLASSES = {
    GRPOTrainer: "TreeGRPOTrainer, or dta_plugin.enable()",
    RLOOTrainer: "TreeRLOOTrainer, or dta_plugin.enable()",
    SFTTrainer: "TreeSFTTrainer",
    DPOTrainer: "TreeDPOTrainer",
    RewardTrainer: "TreeRewardTrainer",
}
_process_config: TreeConfig | None = None
_trainings = 0
_is_watching = False


def watch() -> None:
    """Have trainings looked at from now on. Idempotent."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        Trainer.train = _watched(Trainer.train)  # type: ignore[method-assign]


def expect_trees(config: TreeConfig | None) -> None:
    """What the process was enabled with: trainers without the flag are expected to run as trees, too."""
    global _process_config
    _process_config = config
    if config is not None:
        watch()


def say_if_nothing_trained() -> None:
    """One line at the end of a script that was run with the flag and trained nothing."""
    if not _trainings:
        say(
            "use_dta did nothing: the script ended without a training by a trainer of transformers or TRL. Use "
            "GRPOTrainer or RLOOTrainer, or call dta_plugin.sequence_logprobs in a loop of your own.",
            logging.WARNING,
        )


def _watched(train: Any) -> Any:
    @functools.wraps(train)
    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        global _trainings
        _trainings += 1
        _refuse_what_cannot_run(trainer)
        result = train(trainer, *args, **kwargs)
        reason = _idle_reason(trainer)
        if reason is not None and trainer.accelerator.is_main_process:
            say(f"use_dta did nothing: no call of this training ran as a tree, because {reason}", logging.WARNING)
        return result

    return watched


def _refuse_what_cannot_run(trainer: Trainer) -> None:
    config = tree_config(trainer.args)
    if config is not None and config.on_unsupported == "error" and not has_our_hook(trainer):
        raise UnsupportedError(
            f"use_dta=True in the config of {type(trainer).__name__}, which does not know it. Expected "
            f"{_remedy(trainer)}; or use_dta=False."
        )


def _idle_reason(trainer: Trainer) -> str | None:
    """Why no call ran as a tree; None where one did, or none was asked for."""
    asked = tree_config(trainer.args) if hasattr(trainer.args, "use_dta") else _process_config
    state, sharing = trainer.__dict__.get("_dta_state"), trainer.__dict__.get("_sharing")
    if asked is None or (state and state.calls) or (sharing and sharing.shared_calls):
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
    if any(base.__name__ == "AsyncGRPOTrainer" for base in type(trainer).__mro__):
        return "TreeAsyncGRPOTrainer (dta_plugin.adapters.trl.async_grpo), or dta_plugin.enable(), with TRL 1.16"
    for known, remedy in _CLASSES.items():
        if isinstance(trainer, known):
            return f"{remedy} (dta_plugin.adapters.trl)" if type(trainer) is known else f"{remedy} as its base"
    return f"dta_plugin.adapters.trl.SiblingBatchesMixin before {type(trainer).__name__} in the bases of a class"
