"""transformers' own forwards where verl has put others in their place, for what those cannot do.

verl replaces the forwards of some classes for good when it builds a model. That of attention (Qwen2-VL, Qwen2.5-VL and
GLM-4V with packed rows) goes around transformers' AttentionInterface, by which a tree comes in; those of whole models
take positions and images as verl's engine lays them out, so that they cannot be what a tree is checked against. What
stood there before is kept: attention has it along trees, and models have it `as_transformers_has_them`. All other calls
are verl's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from dta_plugin.models.attention_registry import carried
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.layer_calls import definer
from dta_plugin.models.layers import attention_modules
from dta_plugin.models.stand_in import Place, StandIn

Forward = Callable[..., Any]

# verl's forwards of these fail on batches without images: towers of transformers 5 return more than a tensor.
_FAIL_ON_TEXT = {"qwen2_vl", "qwen2_5_vl", "glm4v"}

# Within how many `as_transformers_has_them` this process is. A backward pass runs in threads of its own.
_depth = 0


@contextmanager
def as_transformers_has_them() -> Iterator[None]:
    """Within the context, models and attention whose forwards verl has replaced run their own."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


class OwnForward(StandIn):
    """In front of a forward of verl's. own: what stood there before. along_trees: whether trees need it."""

    def __init__(self, place: Place, key: str, own: Forward, along_trees: bool) -> None:
        super().__init__(place, key)
        self.own, self.along_trees = own, along_trees

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the one that a call without a tree goes to."""
        return inspect.signature(self.own if _depth else self.behind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        has_tree = (kwargs.get("dta_tree") or carried(kwargs.get("attention_mask"))) is not None
        is_own = self.along_trees if has_tree else _depth > 0
        return (self.own if is_own else self.behind)(*args, **kwargs)


def keeping_own_forwards(apply_monkey_patch: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `apply_monkey_patch`, after which what it has replaced can still be called."""

    @functools.wraps(apply_monkey_patch)
    def wrapped(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        own = {kind: (_own(kind), along_trees) for kind, along_trees in _classes(model).items()}
        result = apply_monkey_patch(model, *args, **kwargs)
        for kind, (forward, along_trees) in own.items():
            if forward is not None and _own(kind) is not forward:
                OwnForward.install(kind, "forward", model, forward, along_trees)
        return result

    return wrapped


def _classes(model: PreTrainedModel) -> dict[type, bool]:
    """Those that have the forwards of a model, of what is under its head, and of attention: whether trees need them."""
    fails_on_text = model.config.model_type in _FAIL_ON_TEXT
    found = dict.fromkeys((definer(type(model)), definer(type(decoder_of(model)))), fails_on_text)
    return found | {definer(type(module)): True for module in attention_modules(model).values()}


def _own(kind: type) -> Forward | None:
    """The forward of a class as transformers defines it; None where it has been replaced, and not by way of us."""
    found = vars(kind)["forward"]
    while isinstance(found, StandIn):
        found = found.own if isinstance(found, OwnForward) else found.behind
    return found if found.__module__ == kind.__module__ else None
