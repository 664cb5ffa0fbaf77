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

from dta_plugin.adapters.trl.protocols import OfflineLike
from dta_plugin.adapters.trl.shared_prefixes import SharedPrefixesMixin, settings_obstacle
from dta_plugin.adapters.trl.upstream import check_offline_trainer
from dta_plugin.balance import SiblingSampler
from dta_plugin.balance.examples import token_columns, token_path
from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import causal_lm, decoder_of, model_cost


class SiblingBatchesMixin(SharedPrefixesMixin):
    """Goes before a trainer of transformers or TRL in the bases.

    tree_config: see `share_prefixes`; a reference model shares, too. The sampler takes the place of the random one
    alone: a `train_sampling_strategy` of another kind, or data that cannot be sorted, keeps the trainer's own order.

    Raises InvalidInputError for packing, padding-free batches, torch.compile and NEFTune, UnsupportedError as
    `share_prefixes` does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer = cast(OfflineLike, self)
        check_offline_trainer(trainer)
        obstacle = settings_obstacle(trainer)
        if obstacle is not None:
            raise InvalidInputError(f"Prefixes cannot be shared: {obstacle}.")
        self._dta_begin()

    def get_train_dataloader(self) -> DataLoader:
        reason = _order_obstacle(self, self.train_dataset)  # type: ignore[attr-defined]
        if reason is not None:
            own = f"batches are the trainer's own, siblings may be apart, because {reason}"
            self._dta_notices.say_once(own, level=logging.WARNING)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        if _order_obstacle(self, dataset) is not None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if self._dta_only_in_steps:  # by the flag, on a trainer whose class does not say so
            other = "batches are made of siblings, other ones than without the plugin: steps log other losses"
            self._dta_notices.say_once(other)
        return sibling_sampler(cast(OfflineLike, self), dataset)


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
        cost=model_cost(decoder_of(causal_lm(trainer.model))),
    )


def _order_obstacle(trainer: object, dataset: Any) -> str | None:
    """Why batches cannot be made of siblings, or None."""
    behind = type(trainer).__mro__[type(trainer).__mro__.index(SiblingBatchesMixin) + 1 :]
    own = next((vars(base)["_get_train_sampler"] for base in behind if "_get_train_sampler" in vars(base)), None)
    if own is not Trainer._get_train_sampler:
        return "this trainer has a sampler of its own"
    args = trainer.args  # type: ignore[attr-defined]
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False):  # transformers 4
        strategy = "group_by_length"
    if strategy != "random":
        return f"train_sampling_strategy={strategy!r} asks for another; leave it at 'random' to bring siblings together"
    return _data_obstacle(dataset)


def _data_obstacle(dataset: Any) -> str | None:
    """Why the token ids of a data set's examples cannot be known before they are read, or None."""
    if dataset is None or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return "an iterable data set is read in its own order; load it as a Dataset to bring siblings together"
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return "set_transform makes its examples when they are read; use map to bring siblings together"
    if not len(dataset):
        return "the data set is empty"
    try:
        token_path(dataset[0])
    except (InvalidInputError, TypeError, ValueError) as error:
        return f"its examples have no token ids that could be sorted, as read before they are collated ({error})"
    return None


def _token_paths(dataset: Any) -> list[np.ndarray]:
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format("numpy", columns=token_columns(dataset.column_names))
    return [token_path(dataset[index]) for index in range(len(dataset))]
