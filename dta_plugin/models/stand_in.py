"""A callable in front of another one, wherever that is looked up, for as long as a model or a graph needs it.

Nobody but who looks it up notices: names, signature and pickles are those of the callable behind.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from transformers import AttentionInterface, PreTrainedModel

from dta_plugin.attention.mask import TreeMask

if TYPE_CHECKING:
    from typing_extensions import Self

# The globals of a file, an AttentionInterface, or a class.
Place = MutableMapping[str, Any] | type

# Shows what is registered for all modeling files; a file's own interface may override some of it.
SHARED_ATTENTION = AttentionInterface()


class StandIn:
    """Stands in front of ``place[key]``, or of the attribute of a class.

    behind: what stood there. models: those it was installed for.
    """

    installed: ClassVar[WeakSet[StandIn]] = WeakSet()

    def __init__(self, place: Place, key: str) -> None:
        self.behind: Callable[..., Any] = _get(place, key)
        self.models: WeakSet[PreTrainedModel] = WeakSet()
        self._place, self._key = place, key
        functools.update_wrapper(self, self.behind, updated=())
        self.installed.add(self)

    @classmethod
    def install(cls, place: Place, key: str, model: PreTrainedModel, *options: Any) -> None:
        """Stand there for a model; once only, however often it is called."""
        standing = _get(place, key)
        if not isinstance(standing, cls):
            standing = cls(place, key, *options)
            _set(place, key, standing)
        standing.models.add(model)

    @classmethod
    def uninstall(cls, model: PreTrainedModel | None) -> None:
        """The model has no need of them any more; None: no model has. Those that none needs give way."""
        for standing in list(StandIn.installed):
            if isinstance(standing, cls):
                if model is None:
                    standing.models.clear()
                else:
                    standing.models.discard(model)
                standing.give_way()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __get__(self, instance: object, owner: type | None = None) -> Self | types.MethodType:
        """As a method, where the place is a class."""
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle of what holds it has the one behind."""
        return copy.copy, (self.behind,)

    def give_way(self) -> None:
        """Put back what was there, once no model needs this and no tree can come by again.

        If somebody has put something else there in the meantime, that stays.
        """
        if self.models:
            return
        alive = next(iter(TreeMask.alive), None)
        if alive is not None:
            weakref.finalize(alive, self.give_way).atexit = False  # type: ignore[misc]  # a property, says its docs
        elif _get(self._place, self._key) is self:
            _set(self._place, self._key, self.behind)


def _get(place: Place, key: str) -> Any:
    return vars(place).get(key) if isinstance(place, type) else place.get(key)


def _set(place: Place, key: str, value: Callable[..., Any]) -> None:
    if isinstance(place, type):
        setattr(place, key, value)
    elif place is SHARED_ATTENTION:
        AttentionInterface.register(key, value)
    else:
        place[key] = value
