"""The recurrent modules of a language model ("mixers"), and by which way each runs on a tree.

*By functions*: what carries state along a sequence is a function that is known here, and that the mixer's own forward
looks up where another can stand: in the globals of its file (transformers 5.15 and newer), or in its own attributes
(before, for delta rules). *By nodes*: the mixer's own forward runs node after node and asks one cache for its states.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from dta_plugin.models.layers import class_has, forward_has
from dta_plugin.models.recurrent_functions import OPERATIONS

_CACHES = ("cache", "cache_params", "past_key_values")
_ASKS = ("get_conv_state", "get_recurrent_state")
_TELLS = ("update_conv_state", "update_recurrent_state")


@dataclass(frozen=True, slots=True, eq=False)
class Functions:
    """Known functions by name, and the mapping that a mixer looks them up in: its file's globals or its attributes."""

    place: dict[str, Any]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Nodes:
    """cache: what the mixer's forward calls the cache that it asks for states."""

    cache: str


def mixers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that carry a state along a sequence; each knows the index of its layer."""
    for module in model.modules():
        if isinstance(vars(module).get("layer_idx"), int) and (
            _is_recurrent(cast(Any, type(module)), type(module).forward) or _attributes(module)
        ):
            yield module


def layer_of(mixer: nn.Module) -> int:
    """The index of its layer."""
    return cast(int, mixer.layer_idx)


def way(mixer: nn.Module) -> Functions | Nodes | None:
    """How it runs on a tree; None if no way is known."""
    return functions(mixer) or _nodes(mixer)


def functions(mixer: nn.Module) -> Functions | None:
    """The known functions, of which some carry its state, that its forward calls, or the one that this extends."""
    if own := _attributes(mixer):
        return Functions(vars(mixer), own)
    for file in (_file(vars(kind)["forward"]) for kind in type(mixer).__mro__ if "forward" in vars(kind)):
        called = tuple(name for name in OPERATIONS if name in file and forward_has(mixer, name))
        if any(OPERATIONS[name].carries_state for name in called):
            return Functions(file, called)
    return None


def _attributes(mixer: nn.Module) -> tuple[str, ...]:
    """The known functions that it has as attributes: a delta rule, and the convolution before it."""
    own = tuple(name for name in OPERATIONS if name in vars(mixer))
    return own if len(own) > 1 else ()


def _nodes(mixer: nn.Module) -> Nodes | None:
    parameters = inspect.signature(type(mixer).forward).parameters
    cache = next((name for name in _CACHES if name in parameters), None)
    return Nodes(cache) if cache is not None and any(class_has(type(mixer), name) for name in _ASKS) else None


@functools.lru_cache(maxsize=1024)
def _is_recurrent(kind: Any, forward: Any) -> bool:
    """kind: the class of a module. forward: the class's, which may be exchanged."""
    return any(class_has(kind, name) for name in (*_TELLS, *OPERATIONS.keys() & _file(forward).keys()))


def _file(forward: Any) -> dict[str, Any]:
    forward = inspect.unwrap(forward)
    return forward.__globals__ if isinstance(forward, FunctionType) else {}
