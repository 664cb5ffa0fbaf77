"""What streamed execution needs of FSDP2: gathered parameters, and backward passes that reduce nothing.

Some of it is private to torch (parameter groups, their flags, the state of a backward pass): read in 2.8 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dta_plugin.errors import InvalidInputError


@contextmanager
def parameters_in_use(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, a call of the model fills in its trainable parameters as its layers see them, by name.

    Of a model that FSDP2 shards these are the gathered ones, which have their values only while their layer runs. It
    gathers a layer in a backward pass and leaves it so, for checkpointing (torch 2.13); here the layer is done with.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: parameter for name, parameter in trained.items() if not isinstance(parameter, DTensor)}
    hooks = []
    for prefix, module in model.named_modules():
        if isinstance(module, FSDPModule):
            collect = _collector(f"{prefix}." if prefix else "", trained, found)
            hooks.append(cast(nn.Module, module).register_forward_pre_hook(collect))
            hooks.append(cast(nn.Module, module).register_forward_hook(_reshard))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _collector(
    prefix: str, trained: Container[str], found: dict[str, nn.Parameter]
) -> Callable[[nn.Module, object], None]:
    def collect(module: nn.Module, _: object) -> None:
        for name, parameter in module.named_parameters():
            if prefix + name in trained and not isinstance(parameter, DTensor):
                found[prefix + name] = parameter

    return collect


def _reshard(module: nn.Module, *_: object) -> None:
    for group in _parameter_groups(cast(FSDPModule, module)):
        if group._reshard_after_forward:
            group.reshard()


@contextmanager
def gradients_held_back(model: nn.Module) -> Iterator[None]:
    """Within the context, backward passes do not make FSDP2 reduce what it has accumulated so far."""
    modules = _modules(model)
    groups = [group for module in modules for group in _parameter_groups(module)]
    own = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for group, (reduces, reduces_all) in zip(groups, own, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduces, reduces_all


def check_backward_is_own(model: nn.Module) -> None:
    """Raises where FSDP2 is in the middle of a backward pass through another call: it would not gather for new ones."""
    for module in _modules(model):
        state: Any = module._get_fsdp_state()
        if state._state_ctx.post_backward_final_callback_queued:
            raise InvalidInputError(
                "One backward pass goes through a streamed call and through another call of a model that FSDP2 shards. "
                "Expected one of them: call backward for each loss by itself, or use executor='packed'."
            )


def reshard(model: nn.Module) -> None:
    """Give the gathered weights up, as after any step."""
    for module in _modules(model):
        module.reshard()


def _modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's own records of what a module shards; torch before 2.13 has at most one."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
