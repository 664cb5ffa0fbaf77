"""One flag, every trainer: with it on, any trainer of transformers shares prefixes while it trains.

GRPO and RLOO have the log-prob hook. SFT, DPO and reward trainers become what TreeSFTTrainer and its like are, batches
made of siblings; all others keep their batches and share what meets in a model call. A trainer is one of these for the
time of its training: its class gets a mixin in front, and is its own again afterwards. Every model among its attributes
shares, references, teachers and reward models too.

Batches are made of siblings, and padding is left without hidden states, only where it is known what the loss reads of
either: for TRL's own code, tried against stock (docs/trainers.md). Any other loss gets its batches as they are, and the
model's own path where rows are padded.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, cast

from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from dta_plugin.adapters.releases import TRL
from dta_plugin.adapters.trl.offline import SiblingBatchesMixin
from dta_plugin.adapters.trl.origin import LIBRARIES, STEP, foreign_method, is_async
from dta_plugin.adapters.trl.protocols import TrainerLike
from dta_plugin.adapters.trl.shared_prefixes import SharedPrefixesMixin, models_of, settings_obstacle
from dta_plugin.config import TreeConfig
from dta_plugin.models.introspection import causal_lm
from dta_plugin.option_places import Place, Scope
from dta_plugin.sharing.obstacles import model_obstacle
from dta_plugin.training.notices import say

_OF_SIBLINGS = (SFTTrainer, DPOTrainer, RewardTrainer)
# Losses and metrics that read no padding: in every release, and in the newest one that was tested. In others, some do.
_MASKED = (*LIBRARIES, *(f"trl.trainer.{name}" for name in ("base_trainer", "sft_", "dpo_", "reward_", "utils")))
_MASKED_NOW = (
    "trl.trainer.",
    *(
        f"trl.experimental.{name}."
        for name in ("a2po", "gkd", "gold", "iw_opd", "sdft", "sdpo", "server_distillation", "tpo")
    ),
)
_OF_ANY_RELEASE = (*LIBRARIES, "trl.")
# Losses of DPO and SFT known to have terms of one pair or token. Others, such as aot, compare pairs of a micro-batch.
_OF_ROWS = {
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "nll", "chunked_nll", "dft"),
}
# Methods of TRL's within a step that call functions of the user, with the completions or to make them.
_WITH_FUNCTIONS = ("_generate", "_calculate_rewards", "_calculate_rewards_from_functions")


def by_hook(trainer: object) -> bool:
    """Whether a trainer is one whose log-probs the plugin computes itself, rather than its model's calls."""
    return isinstance(trainer, GRPOTrainer | RLOOTrainer) or is_async(trainer)


def sharing_obstacle(trainer: Trainer) -> str | None:
    """Why a trainer cannot share prefixes, or None."""
    known = cast(TrainerLike, trainer)
    if not any(model is known.model for model in models_of(trainer)):
        return f"its model, a {type(known.model).__name__}, is none of transformers"
    return model_obstacle(known.model) or settings_obstacle(known)


@contextmanager
def sharing_while_it_trains(trainer: Trainer, config: TreeConfig) -> Iterator[None]:
    """Within the context the trainer's models share prefixes."""
    own = type(trainer)
    head = foreign_method(causal_lm(cast(TrainerLike, trainer).model), ("forward",), _OF_ANY_RELEASE)
    foreign = head or foreign_method(trainer, STEP, _masked())
    is_known = head is None and foreign_method(trainer, STEP, _MASKED) is None
    is_of_siblings = isinstance(trainer, _OF_SIBLINGS) and is_known and not _reads_batches(trainer)
    mixin = SiblingBatchesMixin if is_of_siblings else SharedPrefixesMixin
    settings = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "tree_config": _applicable(trainer, config),
        "_dta_padding_reader": _padding_reader(trainer, foreign),
        # None of TRL's own wants a cache that it did not ask for.
        "_dta_reads_caches": foreign_method(trainer, STEP, _OF_ANY_RELEASE) is not None,
        "_dta_only_in_steps": True,
        "__class__": property(lambda _: own),  # for code that asks the object: super(self.__class__, self)
        **_without_sharing(own),
    }
    try:
        trainer.__class__ = type(own.__name__, (mixin, own), settings)
    except Exception as error:  # of a class that does not let itself be extended
        say(f"use_dta does nothing for this {own.__name__}, which cannot be extended: {error}", logging.WARNING)
        yield
        return
    shared = cast(SharedPrefixesMixin, trainer)
    try:
        shared._dta_begin()
        yield
    finally:
        shared._dta_end()
        vars(object)["__class__"].__set__(trainer, own)


def _without_sharing(trainer_class: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class that call functions of the user, each as one in which models are stock."""

    def paused(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: SharedPrefixesMixin, *args: Any, **kwargs: Any) -> Any:
            with self._dta_functions_of_others():
                return method(self, *args, **kwargs)

        return call

    methods = {name: inspect.getattr_static(trainer_class, name, None) for name in _WITH_FUNCTIONS}
    return {name: paused(method) for name, method in methods.items() if inspect.isfunction(method)}


def _reads_batches(trainer: Trainer) -> bool:
    """Whether the loss depends on which rows are in a batch together, or may: then batches stay as they are."""
    given = getattr(trainer.args, "loss_type", None) or ()
    losses = {given} if isinstance(given, str) else set(given)
    has_own_loss = getattr(trainer, "compute_loss_func", None) is not None
    return has_own_loss or getattr(trainer, "aux_loss_enabled", False) or not losses <= _OF_ROWS


def _masked() -> tuple[str, ...]:
    """Modules whose losses and metrics read no padding, in the installed TRL."""
    is_newest_tested = metadata.version("trl").startswith(f"{TRL.newest_tested}.")
    return _MASKED + _MASKED_NOW if is_newest_tested else _MASKED


def _padding_reader(trainer: Trainer, foreign: str | None) -> str | None:
    """Who may read what a model returns at padding, in words, or None."""
    functions = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
    given = (f"the trainer has {name}" for name in functions if callable(getattr(trainer, name, None)))
    reader = foreign or next(given, None)
    if reader is None:
        return None
    return (
        f"{reader}, which may read what the model computes there; where it does not, put SiblingBatchesMixin "
        "(dta_plugin.adapters.trl) before the trainer in the bases of a class"
    )


def _applicable(trainer: Trainer, config: TreeConfig) -> TreeConfig:
    """Those of the options that apply to model calls; what is not exact is not an error.

    Raises InvalidInputError for others in the trainer's own arguments. Those of the process may be for other trainers:
    one line says what they do not do.
    """
    place = Place(f"in {type(trainer).__name__}", {Scope.CALL, Scope.TRAINING}, "its model calls run as they come")
    if hasattr(trainer.args, "use_dta"):
        place.check(config, prefix="dta_")
    if (line := place.without_effect(config)) is not None and trainer.accelerator.is_main_process:
        say(line, logging.WARNING)
    return replace(place.applying(config), on_unsupported="dense")
