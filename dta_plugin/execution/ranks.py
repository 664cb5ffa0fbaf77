"""What the processes that train one model have to agree on.

Ranks whose weights FSDP2 shards gather them from each other in every call of the model, forward and backward: all must
call it equally often, in the same order. Ranks under DDP, or DeepSpeed ZeRO-1 and 2, meet only over gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar, cast

from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dta_plugin.tree.plan import Plan

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model's weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def watches_gradients(model: nn.Module) -> bool:
    """Whether DDP or DeepSpeed sums gradients over ranks as they arrive: once each, in the order of a stock pass."""
    return isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization_stage")


def is_collective(model: nn.Module) -> bool:
    """Whether ranks are tied together, so that one without sequences has to take part."""
    return watches_gradients(model) or is_sharded(model)


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 shards the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order. Every rank must call it."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ModelCalls:
    """How often a streamed run calls the model.

    forward: in the first pass. before_backward: per chunk, before it goes backward.
    """

    forward: int
    before_backward: list[int]

    @classmethod
    def of(cls, plan: Plan) -> ModelCalls:
        again = (len(missing) + (index < plan.first_kept) for index, missing in enumerate(plan.rebuilds()))
        return cls(len(plan.chunks), list(again))

    def of_all_ranks(self) -> ModelCalls:
        """The most calls that any rank makes; without a chunk it makes one to stand in. Every rank must call this."""
        ranks = gathered(self)
        most = [max(calls) for calls in zip_longest(*(rank.before_backward for rank in ranks), fillvalue=1)]
        return ModelCalls(max(rank.forward for rank in ranks), most)


@contextmanager
def parameters_in_use(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, a call of the model fills in its trainable parameters as its layers see them, by name.

    Of a model that FSDP2 shards these are the gathered ones, which have their values only while their layer runs.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: parameter for name, parameter in trained.items() if not isinstance(parameter, DTensor)}
    hooks = []
    for prefix, module in model.named_modules():
        if isinstance(module, FSDPModule):
            collect = _collector(f"{prefix}." if prefix else "", trained, found)
            hooks.append(cast(nn.Module, module).register_forward_pre_hook(collect))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _collector(
    prefix: str, wanted: Container[str], found: dict[str, nn.Parameter]
) -> Callable[[nn.Module, object], None]:
    def collect(module: nn.Module, _: object) -> None:
        for name, parameter in module.named_parameters():
            if prefix + name in wanted and not isinstance(parameter, DTensor):
                found[prefix + name] = parameter

    return collect


@contextmanager
def gradients_held_back(model: nn.Module) -> Iterator[None]:
    """Within the context, backward passes do not make FSDP2 reduce what it has accumulated so far."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _parameter_groups(module)]
    own = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for group, (reduces, reduces_all) in zip(groups, own, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduces, reduces_all


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's own records of what a module shards; torch before 2.13 has at most one."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
