"""A trainer whose models share prefixes: the handles of its models, and what they shared in its log.

The decoder runs once per shared token (`dta_plugin.share_prefixes`); the trainer's data, collator, loss and metrics are
its own. A batch gives the loss and gradients that it gives the stock trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer

from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.protocols import TrainerLike
from dta_plugin.adapters.trl.state import TreeState, sharing_of
from dta_plugin.adapters.trl.summary import summed_up
from dta_plugin.config import TreeConfig
from dta_plugin.models.introspection import causal_lm, decoder_of, wrappings
from dta_plugin.sharing.decoder_hooks import PrefixSharing, handle_of, share_prefixes
from dta_plugin.sharing.rehearsal import rehearse
from dta_plugin.training.notices import Notices

_NOTHING = (0, 0, 0, 0)


class SharedPrefixesMixin:
    """Goes before a trainer in the bases; `_dta_begin` switches it on.

    tree_config: see `share_prefixes`; `picture` applies, too. _dta_padding_reader, _dta_reads_caches: see
    `PrefixSharing`; of all models of the trainer. _dta_only_in_steps: nothing is shared outside of `training_step` and
    `prediction_step`, where callbacks and others call the model. (The class may be in front of anybody's: names that
    begin with _dta_ are no user's.)
    """

    tree_config = TreeConfig()
    _dta_padding_reader: str | None = None
    _dta_reads_caches = True
    _dta_only_in_steps = False
    model: Any
    _dta_counted: tuple[int, ...] = _NOTHING

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with summed_up(cast(Trainer, self)):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._dta_count("eval_")
        with self._dta_step():
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._dta_count("")
        report = self._dta_sharing.report
        if report is not None:
            self._dta_notices.say_report(report, self.tree_config.picture)
        else:
            self._dta_notices.say_once(f"the model's own path: {self._dta_sharing.reason}", level=logging.WARNING)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._dta_step():
            return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own entry, with the counts of all calls of the model since the last one."""
        prefix = "" if self.model.training else "eval_"
        self._dta_count(prefix)
        calls, shared, flat, tree = self._dta_since[prefix]
        self._dta_since[prefix] = _NOTHING
        if calls:
            logs[f"{prefix}dta/dense_fallback"] = 1 - shared / calls
            if shared:
                logs[f"{prefix}dta/flat_tokens"] = flat / shared
                logs[f"{prefix}dta/tree_tokens"] = tree / shared
                logs[f"{prefix}dta/compression_ratio"] = flat / tree
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if sharing_of(self) is not None:  # training begins with a new model
            self._dta_sharing = self._dta_share(model, self.tree_config)
            self._dta_counted = _NOTHING
        return model

    def _dta_begin(self) -> None:
        """All models of the trainer share from now on: the one that is trained, references, teachers, rewards."""
        self._dta_begun: list[PrefixSharing] = []
        self._dta_unrehearsed: list[PrefixSharing] = []
        self._dta_sharing = self._dta_share(self.model, self.tree_config)
        self._dta_counted = _NOTHING
        self._dta_since: dict[str, tuple[int, ...]] = {"": _NOTHING, "eval_": _NOTHING}  # since the last entry
        for model in models_of(self):
            if causal_lm(model) is not causal_lm(self.model):
                self._dta_share(model, replace(self.tree_config, on_unsupported="dense"))

    def _dta_end(self) -> None:
        """Back to the models' own paths, but for those that shared before."""
        for sharing in self._dta_begun:
            sharing.remove()

    def _dta_share(self, model: nn.Module, config: TreeConfig) -> PrefixSharing:
        before = handle_of(decoder_of(causal_lm(model)))
        if before is not None and self._dta_only_in_steps:  # somebody's own, who has chosen how
            return before
        sharing = share_prefixes(model, replace(config, picture=None))  # which is drawn here
        if before is None:
            sharing.padding_reader, sharing.reads_caches = self._dta_padding_reader, self._dta_reads_caches
            sharing.is_paused = self._dta_only_in_steps
            self._dta_begun.append(sharing)
            self._dta_unrehearsed.append(sharing)
        return sharing

    @contextmanager
    def _dta_functions_of_others(self) -> Iterator[None]:
        """Within the context, in a step, what the user wrote may call the models: of those only reward models share."""
        scorers = [handle_of(decoder_of(causal_lm(model))) for model in _reward_models(self)]
        sharing_now = [each for each in self._dta_begun if not each.is_paused and each not in scorers]
        for sharing in sharing_now:
            sharing.is_paused = True
        try:
            yield
        finally:
            for sharing in sharing_now:
                sharing.is_paused = False

    @contextmanager
    def _dta_step(self) -> Iterator[None]:
        """Within the context the models share."""
        self._dta_rehearse()
        begun = self._dta_begun if self._dta_only_in_steps else []
        for sharing in begun:
            sharing.is_paused = False
        try:
            yield
        finally:
            for sharing in begun:
                sharing.is_paused = True

    def _dta_rehearse(self) -> None:
        """Once, where all ranks begin a step together: models that are not to raise in the middle of one."""
        waiting, self._dta_unrehearsed = self._dta_unrehearsed, []
        for model in (self.model, *models_of(self)):
            sharing = handle_of(decoder_of(causal_lm(model)))
            if sharing not in waiting:
                continue
            waiting.remove(sharing)
            obstacle = rehearse(model, sharing) if sharing.config.on_unsupported == "dense" else None
            if obstacle is not None and sharing is not self._dta_sharing:
                name = type(causal_lm(model)).__name__
                beside = f"a {name} beside the trained model takes its own path: {obstacle}"
                self._dta_notices.say_once(beside, level=logging.WARNING)

    def _dta_count(self, prefix: str) -> None:
        """What the model was called with since the last count belongs to training, or to an evaluation."""
        sharing = self._dta_sharing
        calls = sharing.calls - sharing.cached_calls
        counts = (calls, sharing.shared_calls, sharing.flat_tokens, sharing.tree_tokens)
        sums = zip(self._dta_since[prefix], counts, self._dta_counted, strict=True)
        self._dta_since[prefix] = tuple(total + now - before for total, now, before in sums)
        self._dta_counted = counts

    @property
    def _dta_notices(self) -> Notices:
        return TreeState.for_trainer(cast(TrainerLike, self), self.tree_config).notices


def models_of(trainer: object) -> list[nn.Module]:
    """The models of transformers among a trainer's attributes, those in lists too, wrapped as they are."""
    return [value for value in _attributes(trainer) if _is_model(value)]


def _reward_models(trainer: object) -> list[nn.Module]:
    functions = getattr(trainer, "reward_funcs", None)
    return [function for function in functions if _is_model(function)] if isinstance(functions, list) else []


def settings_obstacle(trainer: TrainerLike) -> str | None:
    """What in a trainer's arguments keeps prefixes from being shared, with the remedy, or None."""
    for name, remedy in (
        ("packing", "a row of several sequences hides what they share; the tree is packed itself"),
        ("padding_free", "a row of several sequences hides what they share; the tree has no padding either"),
        ("torch_compile", "the tree of each batch is another graph"),
    ):
        if getattr(trainer.args, name, False):
            return f"{name}=True with shared prefixes. Expected {name}=False: {remedy}"
    return noise_obstacle(trainer)


def _attributes(trainer: object) -> Iterator[Any]:
    for value in vars(trainer).values():
        yield from value if isinstance(value, list | tuple) else (value,)


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) and isinstance([*wrappings(value)][-1], PreTrainedModel)
