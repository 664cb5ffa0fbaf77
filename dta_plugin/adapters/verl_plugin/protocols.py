"""What the adapter reads of verl's engines, workers and trainers; `upstream` checks that they have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LRScheduler

from dta_plugin.config import TreeConfig


class EngineConfig(Protocol):
    @property
    def strategy(self) -> str: ...
    @property
    def forward_only(self) -> bool: ...


class ModelConfig(Protocol):
    """mtp: verl's settings of multi-token prediction."""

    @property
    def mtp(self) -> object: ...
    @property
    def enable_activation_offload(self) -> bool: ...


class Engine(Protocol):
    """FSDP's for language models."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def engine_config(self) -> EngineConfig: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def lr_scheduler(self) -> LRScheduler: ...
    @property
    def use_ulysses_sp(self) -> bool: ...
    @property
    def ulysses_sequence_parallel_size(self) -> int: ...
    @property
    def _qat_enabled(self) -> bool: ...
    def get_data_parallel_size(self) -> int: ...
    def get_data_parallel_group(self) -> ProcessGroup: ...
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> AbstractContextManager[None]: ...


class OurEngine(Engine, Protocol):
    """What the plugin's engine knows besides: whether the micro-batch is the one that synchronises gradients."""

    @property
    def dta_is_last_micro_batch(self) -> bool: ...


@runtime_checkable
class TreePolicyEngine(Protocol):
    """An engine of the plugin's for policies, whatever of verl's it extends."""

    def configure(self, config: TreeConfig | None, diffusion: Any = None) -> None: ...
    def configure_early(self, config: TreeConfig | None, key: str = ...) -> None: ...


class Part(Protocol):
    """A worker's actor or reference."""

    @property
    def engine(self) -> object: ...
    @property
    def engine_config(self) -> EngineConfig: ...


class Worker(Protocol):
    """config: `actor_rollout_ref`, a DictConfig."""

    @property
    def config(self) -> Any: ...
    @property
    def actor(self) -> Part | None: ...
    @property
    def ref(self) -> Part | None: ...


class WorkerGroup(Protocol):
    """_dispatch_info: per role the data-parallel rank of every worker."""

    @property
    def _dispatch_info(self) -> Mapping[str, Sequence[int]]: ...


class Trainer(Protocol):
    """config: of the whole run, a DictConfig."""

    @property
    def config(self) -> Any: ...
    @property
    def actor_rollout_wg(self) -> WorkerGroup: ...
