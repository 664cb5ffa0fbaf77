"""What the processes that train one model have to agree on.

Ranks whose weights FSDP2 shards gather them from each other in every call of the model, forward and backward: all must
call it equally often, in the same order. Ranks under DDP, or DeepSpeed ZeRO-1 and 2, meet only over gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dta_plugin.execution.streaming.chunk_plan import ChunkPlan

T = TypeVar("T")

# What runs on a rank that has no sequences, or fewer than others.
DUMMY_SEQUENCE = [0, 0]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model's weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 shards the model's weights."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP, the first or the second, shards the model's weights."""
    return is_sharded(model) or is_fsdp1(model)


def watches_gradients(model: nn.Module) -> bool:
    """Whether DDP or DeepSpeed sums gradients over ranks as they arrive: once each, in the order of a stock pass."""
    return isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization_stage")


def without_reducers(model: nn.Module) -> nn.Module:
    """The model without the wrappers that only sum gradients, DDP and DeepSpeed's, or compile."""
    while watches_gradients(model):
        model = model.module  # type: ignore[assignment]  # a module
    return getattr(model, "_orig_mod", model)


def is_collective(model: nn.Module) -> bool:
    """Whether ranks are tied together, so that one without sequences has to take part."""
    return watches_gradients(model) or is_sharded(model) or is_zero3(model)


def has_tensor_parallel(model: nn.Module) -> bool:
    """Whether parameters are sharded other than by FSDP2 alone, which shards along one dimension of its mesh."""
    sharded_by = [sum(not p.is_replicate() for p in x.placements) for x in model.parameters() if isinstance(x, DTensor)]
    return bool(sharded_by) and (max(sharded_by) > 1 or not is_sharded(model))


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 shards the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(model: nn.Module, value: T) -> list[T]:
    """The value of every rank that trains `model` together with this one, in their order. All of them must call it."""
    if not distributed.is_initialized():
        return [value]
    group = _group(model)
    count = distributed.get_world_size(group)
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    distributed.all_gather_object(values, value, group)
    return values  # type: ignore[return-value]


def _group(model: nn.Module) -> Any:
    """The process group over which DDP or FSDP2 works; None: all processes."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    return mesh.get_group() if mesh is not None and mesh.ndim == 1 else None


@dataclass(frozen=True, slots=True)
class ModelCalls:
    """How often a streamed run calls the model.

    forward: in the first pass. before_backward: per chunk, before it goes backward.
    """

    forward: int
    before_backward: list[int]

    @classmethod
    def from_plan(cls, plan: ChunkPlan) -> ModelCalls:
        again = (len(missing) + (index < plan.first_kept) for index, missing in enumerate(plan.rebuilds()))
        return cls(len(plan.chunks), list(again))

    def most_of_all_ranks(self, model: nn.Module) -> ModelCalls:
        """The most calls that any rank makes; without a chunk it makes one to stand in. Every rank must call this."""
        ranks = gathered(model, self)
        most = [max(calls) for calls in zip_longest(*(rank.before_backward for rank in ranks), fillvalue=1)]
        return ModelCalls(max(rank.forward for rank in ranks), most)
