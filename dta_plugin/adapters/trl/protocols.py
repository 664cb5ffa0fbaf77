"""What the adapter reads of a trainer: `TrainerLike` of any of transformers, `GRPOLike` of TRL's GRPO and RLOO.

Names that are no documented interface are in `upstream` as well, which checks that a trainer has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from dta_plugin.adapters.trl.generation_batch import Inputs

Metrics = Mapping[str, Mapping[str, list[float]]]  # by mode, "train" or "eval"; TRL averages a list when it logs


class GradientState(Protocol):
    @property
    def sync_gradients(self) -> bool: ...
    @property
    def plugin_kwargs(self) -> Mapping[str, Any]: ...


class Accelerator(Protocol):
    """accelerate's."""

    @property
    def device(self) -> torch.device: ...
    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def sync_gradients(self) -> bool: ...
    @property
    def gradient_state(self) -> GradientState: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]: ...
    def unwrap_model(self, model: nn.Module) -> nn.Module: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def gather(self, tensor: torch.Tensor) -> torch.Tensor: ...


class TrainingArguments(Protocol):
    @property
    def seed(self) -> int: ...
    @property
    def data_seed(self) -> int | None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def gradient_checkpointing_kwargs(self) -> Any: ...


class OnlineArguments(TrainingArguments, Protocol):
    @property
    def steps_per_generation(self) -> int: ...


class TrainerState(Protocol):
    @property
    def global_step(self) -> int: ...


class TrainerLike(Protocol):
    """What every trainer of transformers has."""

    @property
    def args(self) -> TrainingArguments: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def model_wrapped(self) -> nn.Module: ...
    @property
    def state(self) -> TrainerState: ...
    @property
    def callback_handler(self) -> CallbackHandler: ...
    def add_callback(self, callback: TrainerCallback) -> None: ...


class OfflineLike(TrainerLike, Protocol):
    """One whose batches are made of siblings."""

    @property
    def _train_batch_size(self) -> int: ...


class DiffusionLike(TrainerLike, Protocol):
    """One that samples from a diffusion LM."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def is_fsdp_enabled(self) -> bool: ...


class AsyncLike(TrainerLike, Protocol):
    """One that trains on rows of trees."""

    @property
    def temperature(self) -> float: ...
    @property
    def _metrics(self) -> Metrics: ...


class GRPOLike(TrainerLike, Protocol):
    """A trainer with a generation buffer and a log-prob hook. beta, loss_type, top_entropy_quantile: RLOO has none."""

    _buffered_inputs: list[Inputs] | None

    @property
    def args(self) -> OnlineArguments: ...
    @property
    def processing_class(self) -> object: ...
    @property
    def temperature(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def loss_type(self) -> str: ...
    @property
    def top_entropy_quantile(self) -> float: ...
    @property
    def _step(self) -> int: ...
    @property
    def _metrics(self) -> Metrics: ...
