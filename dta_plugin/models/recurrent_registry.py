"""Our dispatcher in front of the forward of every recurrent module's class, and of the functions that it calls.

As for attention (attention_registry.py): the model does not change, a call without a tree goes to what stood there
before with the arguments it came with, and dispatchers stay until `uninstall` and as long as graphs of tree calls are
alive, because a checkpointed layer runs again in the backward pass.

A mixer learns of the tree by the keyword ``dta_tree``, or, where its decoder layer hands no keywords on to it, from the
layer (layer_calls.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention.mask import TreeMask
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.attention_registry import carried
from dta_plugin.models.layer_calls import definer, install_around, tree_of_layer
from dta_plugin.models.recurrent_functions import MixerCall
from dta_plugin.models.recurrent_layers import Functions, functions, mixers, way
from dta_plugin.models.recurrent_nodes import run_by_nodes
from dta_plugin.models.stand_in import StandIn


def install(model: PreTrainedModel) -> None:
    """Route the recurrent modules of a language model along trees whenever a call carries one. Idempotent."""
    found = mixers(model)
    for mixer in found:
        _Mixer.install(definer(type(mixer)), "forward", model)
        own = functions(mixer)
        if own is not None and own.place is not vars(mixer):
            for name in own.names:
                _Function.install(own.place, name, model)
    install_around(model, found)


def uninstall(model: PreTrainedModel | None = None) -> None:
    """The model has no need of dispatchers any more; None: no model has. See `attention_registry.uninstall`."""
    for kind in (_Mixer, _Function):
        kind.uninstall(model)


class _Now(threading.local):
    """mixer: whose forward this thread is in. call: along which tree, if functions go along it."""

    mixer: nn.Module | None = None
    call: MixerCall | None = None


_now = _Now()


@contextmanager
def _in_forward(mixer: nn.Module, call: MixerCall | None) -> Iterator[None]:
    before = _now.mixer, _now.call
    _now.mixer, _now.call = mixer, call
    try:
        yield
    finally:
        _now.mixer, _now.call = before


class _Mixer(StandIn):
    """A recurrent module, along a tree where it has one."""

    def __call__(self, mixer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _now.mixer is mixer:  # its class's forward has called that of a parent, or what it wraps
            return self.behind(mixer, *args, **kwargs)
        mask = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and carried(x)), None)
        tree: TreeMask | None = kwargs.get("dta_tree") or carried(mask) or tree_of_layer()
        if tree is None:
            with _in_forward(mixer, None) if _now.call else nullcontext():
                return self.behind(mixer, *args, **kwargs)
        args = tuple(None if x is mask else x for x in args)
        kwargs = {name: None if x is mask else x for name, x in kwargs.items() if name != "dta_tree"}
        out = self._along(tree, mixer, args, kwargs)
        tree.state_calls[id(mixer)] += 1
        return out

    def _along(self, tree: TreeMask, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, own = MixerCall(tree, mixer), way(mixer)
        if isinstance(own, Functions):
            with _in_forward(mixer, call), _own_functions(mixer, own, call):
                out = self.behind(mixer, *args, **kwargs)
            call.check_carried(own.names)
            return out
        if own is None:
            raise UnsupportedError(f"{no_way(mixer)}.")
        with _in_forward(mixer, None):
            return run_by_nodes(call, mixer, self.behind, own.cache, args, kwargs)


class _Function(StandIn):
    """A function by which mixers carry state: along the tree within a mixer's call that has one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _now.call
        return self.behind(*args, **kwargs) if call is None else call.run(self._key, *args, **kwargs)


@contextmanager
def _own_functions(mixer: nn.Module, own: Functions, call: MixerCall) -> Iterator[None]:
    """Functions that are attributes of the mixer are exchanged for the time of a call."""
    if own.place is not vars(mixer):
        yield
        return
    before = {name: own.place[name] for name in own.names}
    own.place.update({name: partial(call.run, name) for name in own.names})
    try:
        yield
    finally:
        own.place.update(before)


def no_way(mixer: nn.Module) -> str:
    """Why a mixer cannot run along a tree."""
    return (
        f"{type(mixer).__name__} carries its state by functions that are not known, and asks no cache for it; use a "
        "recurrent layer of transformers 5.15 or newer"
    )
