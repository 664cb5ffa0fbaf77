"""Which tree the layer that a thread is in runs along: for modules inside to which it hands no keywords on.

A dispatcher stands in front of such layers. They have the tree from the model's keywords, and checkpointing gives them
the same ones again when it runs them again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def running_along(tree: TreeMask | None) -> Iterator[None]:
    """What `tree_of_layer` says within the context."""
    before, _now.tree = _now.tree, tree
    try:
        yield
    finally:
        _now.tree = before


class LayerCall(StandIn):
    """In front of a layer's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with running_along(kwargs.get("dta_tree") or carried(kwargs.get("attention_mask"))):
            return self.behind(*args, **kwargs)


def definer(kind: type) -> type:
    """The class that a class has its forward from."""
    return next(parent for parent in kind.__mro__ if "forward" in vars(parent))


def install_around(model: PreTrainedModel, found: set[Any]) -> None:
    """Dispatchers in front of all modules that hold one of those found."""
    for module in model.modules():
        if any(child in found for child in module.children()):
            LayerCall.install(definer(type(module)), "forward", model)
