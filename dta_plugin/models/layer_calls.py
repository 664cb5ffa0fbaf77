"""Which tree the layer that a thread is in runs along: for modules inside to which it hands no keywords on.

A dispatcher stands in front of such layers. They have the tree from the model's keywords, and checkpointing gives them
the same ones again when it runs them again.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention.mask import TreeMask
from dta_plugin.models.attention_registry import carried
from dta_plugin.models.stand_in import StandIn


class _Now(threading.local):
    tree: TreeMask | None = None


_now = _Now()


def tree_of_layer() -> TreeMask | None:
    """That of the innermost layer with a dispatcher."""
    return _now.tree


@contextmanager
def _running_along(tree: TreeMask | None) -> Iterator[None]:
    before, _now.tree = _now.tree, tree
    try:
        yield
    finally:
        _now.tree = before


class LayerCall(StandIn):
    """In front of a layer's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _running_along(kwargs.get("dta_tree") or carried(kwargs.get("attention_mask"))):
            return self.behind(*args, **kwargs)


def definer(kind: type) -> type:
    """The class that a class has its forward from."""
    return next(parent for parent in kind.__mro__ if "forward" in vars(parent))


# Looked for once per model and what they hold.
_holders: WeakKeyDictionary[PreTrainedModel, dict[frozenset[int], list[nn.Module]]] = WeakKeyDictionary()


def install_around(model: PreTrainedModel, found: Collection[nn.Module]) -> None:
    """Dispatchers in front of all modules that hold one of those found."""
    if not found:
        return
    of_model = _holders.setdefault(model, {})
    key = frozenset(map(id, found))
    if key not in of_model:
        of_model[key] = [m for m in model.modules() if any(id(child) in key for child in m.children())]
    for holder in of_model[key]:
        LayerCall.install(definer(type(holder)), "forward", model)
