"""Run something right after a module has been imported, or now if it is there already.

verl imports the plugin in the middle of its own imports. What the plugin extends is extended when verl gets to it, so
that nothing is imported early, twice, or in a process that never needs it. Others may look modules up at any time, from
any thread, and from within their own import hooks: an action waits until its module has really been executed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from weakref import WeakSet

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` once, after the module `name` has been executed."""
    with _Finder.lock:
        finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None) or _Finder()
        module = finder.executed_module(name)
        if module is None:
            finder.waiting.setdefault(name, []).append(action)
            if finder not in sys.meta_path:
                sys.meta_path.insert(0, finder)
            return
    action(module)


class _Finder(MetaPathFinder):
    """Finds nothing by itself; wraps the loader that the other finders come up with."""

    lock = threading.Lock()

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}
        self._executed: WeakSet[ModuleType] = WeakSet()
        self._here = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        searched: set[str] = self._here.__dict__.setdefault("searched", set())
        if fullname not in self.waiting or fullname in searched:  # another hook that asks all finders, this one too
            return None
        searched.add(fullname)
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            found = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            searched.discard(fullname)
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, _Announcing):
            spec.loader = _Announcing(spec.loader, self)
        return spec

    def executed_module(self, name: str) -> ModuleType | None:
        """The module, unless it has yet to be executed."""
        module = sys.modules.get(name)
        is_executed = module in self._executed or not getattr(getattr(module, "__spec__", None), "_initializing", False)
        return module if is_executed else None

    def announce(self, module: ModuleType) -> None:
        with self.lock:
            self._executed.add(module)
            actions = self.waiting.pop(module.__name__, [])
        for action in actions:
            action(module)


class _Announcing(Loader):
    """Another finder's loader, which tells ours what it has executed. What it can do besides, it still can."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.finder.announce(sys.modules.get(module.__spec__.name, module))
