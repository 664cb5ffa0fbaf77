"""Offline training with shared prefixes: SFT on trajectories, preference pairs, reward models.

    trainer = TreeDPOTrainer(model=..., args=DPOConfig(...), train_dataset=...)  # TreeSFTTrainer, TreeRewardTrainer
    class MyTrainer(SiblingBatchesMixin, AnyTrainerOfTransformers): ...

The decoder runs once per shared token (`dta_plugin.share_prefixes`), and batches are made of siblings
(`balance.SiblingSampler`); the trainer's collator, loss and metrics are its own. A batch gives the loss and gradients
that it gives the stock trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import Any, cast

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.protocols import OfflineLike
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.adapters.trl.upstream import check_offline_trainer
from dta_plugin.balance import SiblingSampler
from dta_plugin.balance.examples import token_columns, token_path
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import causal_lm, decoder_of, model_cost
from dta_plugin.sharing.decoder_hooks import share_prefixes


class SiblingBatchesMixin:
    """Goes before a trainer of transformers or TRL in the bases.

    tree_config: see `share_prefixes`; a reference model shares, too. The sampler takes the place of the random one
    alone: a `train_sampling_strategy` of another kind, or an iterable data set, keeps the trainer's own order.

    Raises InvalidInputError for packing, padding-free batches, torch.compile and NEFTune, UnsupportedError as
    `share_prefixes` does.
    """

    tree_config = TreeConfig()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_offline_trainer(self)
        _check_arguments(self.args)  # type: ignore[attr-defined]
        if (noise := noise_obstacle(cast(OfflineLike, self))) is not None:
            raise InvalidInputError(f"Prefixes cannot be shared: {noise}.")
        self._sharing = share_prefixes(self.model, self.tree_config)  # type: ignore[attr-defined]
        self._counted: tuple[int, ...] = (0, 0, 0, 0)
        self._since: dict[str, tuple[int, ...]] = {"": (0, 0, 0, 0), "eval_": (0, 0, 0, 0)}  # since the last entry
        if getattr(self, "ref_model", None) is not None:
            share_prefixes(self.ref_model, self.tree_config)  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> DataLoader:
        reason = _sibling_order_obstacle(self.args, self.train_dataset)  # type: ignore[attr-defined]
        if reason is not None:
            self._say(f"batches are the trainer's own, siblings may be apart, because {reason}", logging.WARNING)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if _next_sampler(type(self)) is not Trainer._get_train_sampler:
            self._say("batches are in the order of this trainer's own sampler, siblings may be apart", logging.WARNING)
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        if _sibling_order_obstacle(self.args, dataset) is not None:  # type: ignore[attr-defined]
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return sibling_sampler(cast(OfflineLike, self), dataset)

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
        prefix = "" if self.model.training else "eval_"  # type: ignore[attr-defined]
        self._count(prefix)
        calls, shared, flat, tree = self._since[prefix]
        self._since[prefix] = (0, 0, 0, 0)
        if calls:
            logs[f"{prefix}dta/dense_fallback"] = 1 - shared / calls
            if shared:
                logs[f"{prefix}dta/flat_tokens"] = flat / shared
                logs[f"{prefix}dta/tree_tokens"] = tree / shared
                logs[f"{prefix}dta/compression_ratio"] = flat / tree
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _count(self, prefix: str) -> None:
        """What the model was called with since the last count belongs to training, or to an evaluation."""
        sharing = self._sharing
        counts = (sharing.calls, sharing.shared_calls, sharing.flat_tokens, sharing.tree_tokens)
        sums = zip(self._since[prefix], counts, self._counted, strict=True)
        self._since[prefix] = tuple(total + now - before for total, now, before in sums)
        self._counted = counts

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if "_sharing" in self.__dict__:  # training begins with a new model
            self._sharing, self._counted = share_prefixes(model, self.tree_config), (0, 0, 0, 0)
        return model

    def _say(self, message: str, level: int = logging.INFO, topic: str | None = None) -> None:
        trainer = cast(OfflineLike, self)
        TreeState.for_trainer(trainer, self.tree_config).notices.say_once(message, topic, level)


class TreeSFTTrainer(SiblingBatchesMixin, SFTTrainer):
    """SFTTrainer that computes what the sequences of a batch share once, with the same losses and gradients."""


class TreeDPOTrainer(SiblingBatchesMixin, DPOTrainer):
    """DPOTrainer that computes what the pairs of a batch share once, with the same losses and gradients."""


class TreeRewardTrainer(SiblingBatchesMixin, RewardTrainer):
    """RewardTrainer that computes what the pairs of a batch share once, with the same losses and gradients."""


def sibling_sampler(trainer: OfflineLike, dataset: Any) -> SiblingSampler:
    """The order of a tokenised, map-style data set that suits a trainer's batches."""
    args = trainer.args
    return SiblingSampler(
        _token_paths(dataset),
        trainer._train_batch_size,
        world_size=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        model=model_cost(decoder_of(causal_lm(trainer.model))),
    )


def _check_arguments(args: object) -> None:
    for name, remedy in (
        ("packing", "a row of several sequences hides what they share; the tree is packed itself"),
        ("padding_free", "a row of several sequences hides what they share; the tree has no padding either"),
        ("torch_compile", "the tree of each batch is another graph"),
    ):
        if getattr(args, name, False):
            raise InvalidInputError(f"{name}=True with shared prefixes. Expected {name}=False: {remedy}.")


def _next_sampler(trainer: type) -> Any:
    """What `_get_train_sampler` of the bases behind the mixin is."""
    behind = trainer.__mro__[trainer.__mro__.index(SiblingBatchesMixin) + 1 :]
    return next((vars(base)["_get_train_sampler"] for base in behind if "_get_train_sampler" in vars(base)), None)


def _sibling_order_obstacle(args: object, dataset: Any) -> str | None:
    if dataset is None or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return "an iterable data set is read in its own order; load it as a Dataset to bring siblings together"
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False):  # transformers 4
        strategy = "group_by_length"
    if strategy != "random":
        return f"train_sampling_strategy={strategy!r} asks for another; leave it at 'random' to bring siblings together"
    return None


def _token_paths(dataset: Any) -> list[np.ndarray]:
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format("numpy", columns=token_columns(dataset.column_names))
    return [token_path(dataset[index]) for index in range(len(dataset))]
