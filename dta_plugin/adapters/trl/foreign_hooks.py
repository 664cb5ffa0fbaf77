"""Hooks of others: on a model's modules, where a tree shows one row in place of many, and on its weights.

What a forward hook changes is compared with the model's own path before the first tree (`probe`), as all that a model
does is. What it keeps is another thing: a loss of somebody else's may read it, and would be another loss. A backward
hook gets gradients that are sums over the rows that share a token, and what it makes of them is not known. Hooks on
weights, and callbacks between micro-batches, see the gradient of each micro-batch: then each keeps its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dta_plugin.adapters.trl.origin import foreign_method, unknown_loss
from dta_plugin.adapters.trl.protocols import GRPOLike

# Those whose hooks do nothing to values by row: they gather weights, cast, mark inputs, or count and log parameters.
_LIBRARIES = (
    *("torch.", "transformers.", "accelerate.", "peft.", "trl.", "dta_plugin."),
    *("deepspeed.", "bitsandbytes.", "liger_kernel.", "wandb."),
)


def hook_obstacle(model: nn.Module, loss: str | None) -> str | None:
    """Why hooks on a model, or on the part that runs as a tree, keep it from running so, with the remedy, or None.

    loss: whose loss it is where it is not known what it reads, in words; None for TRL's.
    """
    backward = next(_of_others(model, "_backward_pre_hooks", "_backward_hooks"), None)
    if backward is not None:
        return f"{backward} gets gradients that a tree has summed over the rows that share a token; remove the hook"
    forward = None if loss is None else next(_of_others(model, "_forward_pre_hooks", "_forward_hooks"), None)
    if forward is None:
        return None
    return (
        f"{forward} sees tokens of a tree in place of rows, and what it keeps may be read: {loss}; remove the hook, or "
        "ask the model for hidden states where the loss is computed"
    )


def hook_notice(model: nn.Module) -> str | None:
    """What others' forward hooks see of a tree, or None where there are none. It changes nothing that is trained."""
    forward = next(_of_others(model, "_forward_pre_hooks", "_forward_hooks"), None)
    return (
        forward and f"{forward} sees the tokens of a tree, one row [1, tokens, ...], shared ones once, and not the rows"
    )


def window_reader(trainer: GRPOLike) -> str | None:
    """Why the micro-batches of an accumulation window stay as TRL made them, or None: only their sum is read."""
    return unknown_loss(trainer) or gradient_reader(trainer)


def gradient_reader(trainer: GRPOLike) -> str | None:
    """Who may look at the gradient of each micro-batch, or change it, in words; None if nobody does."""
    for name, weight in trainer.model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if (origin := next(_foreign(getattr(weight, kind, None)), None)) is not None:
                return f"a gradient hook of {origin} on {name} sees the gradient of each"
    links = (
        foreign_method(callback, ("on_substep_end",), _LIBRARIES) for callback in trainer.callback_handler.callbacks
    )
    link = next((link for link in links if link is not None), None)
    return link and f"{link}, which may look at the gradient of each"


def _of_others(model: nn.Module, *kinds: str) -> Iterator[str]:
    """The hooks of these kinds that are of no known library, in words."""
    hooked = _hooked(model)
    names = {module: name for name, module in model.named_modules()} if hooked else {}
    for module in hooked:
        for kind in kinds:
            direction = "backward" if "backward" in kind else "forward"
            for origin in _foreign(getattr(module, kind)):
                yield f"a {direction} hook of {origin} on {names[module] or type(model).__name__}"


def _hooked(model: nn.Module) -> list[nn.Module]:
    """The modules that have hooks. Each call of the model waits for it, and `named_modules` takes longer."""
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    found = []
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            found.append(module)
        waiting += reversed([*module._modules.values()])
    return found


def _foreign(hooks: Mapping[int, Any] | None) -> Iterator[str]:
    """The modules, of no known library, whose code runs in some of these hooks."""
    origins = (_origin(hook) for hook in (hooks or {}).values())
    return (origin for origin in origins if not f"{origin}.".startswith(_LIBRARIES))


def _origin(hook: Any) -> str:
    """The module whose code a hook runs."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    code = getattr(hook, "__globals__", None)
    return str(type(hook).__module__ if code is None else code.get("__name__"))
