"""A trainer whose models share prefixes: the handles of its models, and what they shared in its log.

The decoder runs once per shared token (`dta_plugin.share_prefixes`); the trainer's data, collator, loss and metrics are
its own. A batch gives the loss and gradients that it gives the stock trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.protocols import TrainerLike
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.config import TreeConfig
from dta_plugin.models.introspection import causal_lm, decoder_of, wrappings
from dta_plugin.sharing.decoder_hooks import PrefixSharing, handle_of, share_prefixes

_NOTHING = (0, 0, 0, 0)


class SharedPrefixesMixin:
    """Goes before a trainer in the bases; `_begin_sharing` switches it on.

    tree_config: see `share_prefixes`. padding_reader, reads_caches: see `PrefixSharing`; of all models of the trainer.
    """

    tree_config = TreeConfig()
    padding_reader: str | None = None
    reads_caches = True
    model: Any
    _counted: tuple[int, ...] = _NOTHING

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._count("eval_")
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._count("")
        report = self._sharing.report
        if report is not None:
            self._say(str(report), topic="first shared step")
        else:
            self._say(f"the model's own path: {self._sharing.reason}", logging.WARNING)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own entry, with the counts of all calls of the model since the last one."""
        prefix = "" if self.model.training else "eval_"
        self._count(prefix)
        calls, shared, flat, tree = self._since[prefix]
        self._since[prefix] = _NOTHING
        if calls:
            logs[f"{prefix}dta/dense_fallback"] = 1 - shared / calls
            if shared:
                logs[f"{prefix}dta/flat_tokens"] = flat / shared
                logs[f"{prefix}dta/tree_tokens"] = tree / shared
                logs[f"{prefix}dta/compression_ratio"] = flat / tree
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if "_sharing" in self.__dict__:  # training begins with a new model
            self._sharing = self._share(model, self.tree_config)
            self._counted = _NOTHING
        return model

    def _begin_sharing(self) -> None:
        """All models of the trainer share from now on: the one that is trained, references, teachers, rewards."""
        self._begun: list[PrefixSharing] = []
        self._sharing = self._share(self.model, self.tree_config)
        self._counted = _NOTHING
        self._since: dict[str, tuple[int, ...]] = {"": _NOTHING, "eval_": _NOTHING}  # since the last entry
        for model in models_of(self):
            if causal_lm(model) is not causal_lm(self.model):
                self._share(model, replace(self.tree_config, on_unsupported="dense"))

    def _end_sharing(self) -> None:
        """Back to the models' own paths, but for those that shared before."""
        for sharing in self._begun:
            sharing.remove()

    def _share(self, model: nn.Module, config: TreeConfig) -> PrefixSharing:
        before = handle_of(decoder_of(causal_lm(model)))
        sharing = share_prefixes(model, config)
        if before is None:
            sharing.padding_reader, sharing.reads_caches = self.padding_reader, self.reads_caches
            self._begun.append(sharing)
        return sharing

    def _count(self, prefix: str) -> None:
        """What the model was called with since the last count belongs to training, or to an evaluation."""
        sharing = self._sharing
        calls = sharing.calls - sharing.cached_calls
        counts = (calls, sharing.shared_calls, sharing.flat_tokens, sharing.tree_tokens)
        sums = zip(self._since[prefix], counts, self._counted, strict=True)
        self._since[prefix] = tuple(total + now - before for total, now, before in sums)
        self._counted = counts

    def _say(self, message: str, level: int = logging.INFO, topic: str | None = None) -> None:
        trainer = cast(TrainerLike, self)
        TreeState.for_trainer(trainer, self.tree_config).notices.say_once(message, topic, level)


def models_of(trainer: object) -> list[nn.Module]:
    """The models of transformers among a trainer's attributes, those in lists too, wrapped as they are."""
    return [value for value in _attributes(trainer) if _is_model(value)]


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
